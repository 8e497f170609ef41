"""One step, many steps, and going on: sums over global counts (C44), the NaN guard (C49), bit-equal resumption."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from train_toy import (
    OBJECTIVE,
    ToyBatch,
    ToyModel,
    ToyObjective,
    copied,
    losses_of,
    plain_config,
    pocket_state,
    same,
    text_batches,
    text_rows,
)

from fledge.batches import Loss
from fledge.errors import CheckpointError, TrainingHalted
from fledge.train.loop import fit, train_step
from fledge.train.optim import OptimizerSet
from fledge.train.schedule import Schedule


def toy_batch(values: list[float], mask: list[float]) -> ToyBatch:
    x_N = torch.tensor(values)
    return ToyBatch(x_N, 3 * x_N + 1, torch.tensor(mask))


def test_the_metrics_of_a_step_by_hand() -> None:
    model = ToyModel()
    pairs = [(ToyObjective(), toy_batch([1.0, 2.0], [1.0, 0.0])), (ToyObjective(), toy_batch([3.0], [1.0]))]
    metrics = train_step(model, OptimizerSet(model, plain_config()), pairs)
    # w = (.5, -.5): predictions 0, .5, 1 for targets 4, 7, 10; the second one is masked.
    assert metrics["loss/square"] == pytest.approx((16 + 81) / 2)
    assert metrics["loss/rows"] == pytest.approx(1.5 / 3)
    assert metrics["loss"] == pytest.approx(97 / 2 + 0.1 * 0.5)
    assert (metrics["count/square"], metrics["count/rows"]) == (2.0, 3.0)
    assert metrics["masked"] == pytest.approx(2 / 3)
    # d/dw0: mean of 2 (p - y) x over unmasked, plus .1 x mean x; d/dw1 alike.
    expected = math.hypot((2 * -4 * 1 + 2 * -9 * 3) / 2 + 0.1 * 2, (2 * -4 + 2 * -9) / 2 + 0.1)
    assert metrics["grad_norm"] == pytest.approx(expected, rel=1e-5)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 5), max_size=3, unique=True), seed=st.integers(0, 50))
def test_c44_gradients_do_not_depend_on_how_the_batch_is_cut(cuts: list[int], seed: int) -> None:
    rows = text_rows(seed, 6)

    def gradients(parts: list[list[Any]]) -> dict[str, torch.Tensor]:
        state = pocket_state()
        with torch.no_grad():
            for index, parameter in enumerate(state.model.parameters()):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(index))
        pairs = [(OBJECTIVE, OBJECTIVE.collate(part)) for part in parts]
        train_step(state.model, state.optimizers, pairs)
        return {n: p.grad.to_dense() for n, p in state.model.named_parameters() if p.grad is not None}

    edges = [0, *sorted(cuts), 6]
    whole = gradients([rows])
    for name, gradient in gradients([rows[a:b] for a, b in itertools.pairwise(edges)]).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-5, msg=name)


def test_clipping_scales_dense_and_sparse_gradients_to_the_given_norm() -> None:
    state, other = pocket_state(), pocket_state()
    for each in (state, other):
        fit(each, text_batches, 3)
    pairs = text_batches(3)
    norm = train_step(state.model, state.optimizers, pairs)["grad_norm"]
    clipped = train_step(other.model, other.optimizers, pairs, clip_norm=norm / 4)["grad_norm"]
    assert clipped == norm
    squares = [p.grad.to_dense().square().sum() for p in other.model.parameters() if p.grad is not None]
    assert float(torch.stack(squares).sum().sqrt()) == pytest.approx(norm / 4, rel=1e-5)
    for mine, clip in zip(state.model.parameters(), other.model.parameters(), strict=True):
        if mine.grad is not None and clip.grad is not None:
            torch.testing.assert_close(clip.grad.to_dense() * 4, mine.grad.to_dense())


def test_a_step_without_any_target_changes_nothing_and_reports_zero() -> None:
    model = ToyModel()
    optimizers = OptimizerSet(model, plain_config())
    before = copied(dict(model.named_parameters()))
    metrics = train_step(model, optimizers, [(ToyObjective(), toy_batch([], []))])
    assert metrics["loss"] == metrics["grad_norm"] == 0.0
    assert same(before, dict(model.named_parameters()))


def test_an_objective_whose_counts_disagree_with_its_batch_is_a_bug_and_said() -> None:
    class Wrong(ToyObjective):
        def loss(self, model: torch.nn.Module, batch: ToyBatch) -> Any:
            loss = super().loss(model, batch)
            return type(loss)({n: replace(t, count=t.count + 1) for n, t in loss.terms.items()}, loss.stats)

    model = ToyModel()
    with pytest.raises(AssertionError, match="square: loss and batch disagree"):
        train_step(model, OptimizerSet(model, plain_config()), [(Wrong(), toy_batch([1.0], [1.0]))])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_c49_nan_halts_with_the_batch_on_disk_and_the_weights_untouched(poison: float, tmp_path: Path) -> None:
    model = ToyModel()
    optimizers = OptimizerSet(model, plain_config())
    train_step(model, optimizers, [(ToyObjective(), toy_batch([1.0], [1.0]))])
    before, state_before = copied(dict(model.named_parameters())), copied(optimizers.tensors())
    bad = toy_batch([1.0, poison], [1.0, 1.0])
    where = tmp_path / "deep" / "halted.safetensors"
    pairs = [(ToyObjective(), toy_batch([2.0], [1.0])), (ToyObjective(), bad)]
    with pytest.raises(TrainingHalted, match=r"halted\.safetensors"):
        train_step(model, optimizers, pairs, dump_to=where)
    assert same(before, dict(model.named_parameters()))
    assert same(state_before, optimizers.tensors())
    dumped = load_file(where)
    assert torch.equal(dumped["1.x_N"], bad.x_N) or math.isnan(poison)
    assert dumped.keys() == {f"{i}.{field}" for i in (0, 1) for field in ("x_N", "y_N", "mask_N")}


class Spoiled(ToyObjective):
    """The toy's loss plus whatever `spoil` makes of the predictions."""

    def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._spoil = spoil

    def loss(self, model: torch.nn.Module, batch: ToyBatch) -> Loss:
        loss = super().loss(model, batch)
        square = loss.terms["square"]
        spoiled = replace(square, sum=square.sum + self._spoil(model(batch.x_N)))
        return Loss({**loss.terms, "square": spoiled}, loss.stats)


def test_a_nan_that_appears_only_in_the_gradient_halts_too() -> None:
    cusp = Spoiled(lambda y_N: (y_N * 0).sum().sqrt())  # value 0, derivative infinite times zero
    model = ToyModel()
    with pytest.raises(TrainingHalted, match="gradient norm nan"):
        train_step(model, OptimizerSet(model, plain_config()), [(cusp, toy_batch([1.0], [1.0]))])


def test_an_infinite_loss_with_a_finite_gradient_halts_too() -> None:
    endless = Spoiled(lambda y_N: torch.tensor(float("inf")))
    model = ToyModel()
    with pytest.raises(TrainingHalted, match="loss inf"):
        train_step(model, OptimizerSet(model, plain_config()), [(endless, toy_batch([1.0], [1.0]))])


def test_training_learns() -> None:
    state = pocket_state(40)
    records: list[Any] = []
    fit(state, lambda _: text_batches(0), 40, [(1, lambda _, metrics: records.append(metrics))], clip_norm=1.0)
    assert losses_of(records)[0] == pytest.approx(math.log(40), rel=1e-4)
    assert sum(losses_of(records)[-5:]) / 5 < 2.3  # narrow and gently trained: it has begun to learn by heart


def test_callbacks_run_every_so_often_and_after_the_last_step() -> None:
    state, seen = pocket_state(), []
    fit(state, text_batches, 7, [(3, lambda s, m: seen.append((s.step, m["step"], m["lr_scale"])))])
    assert [step for step, _, _ in seen] == [3, 6, 7]
    assert [shown for _, shown, _ in seen] == [3.0, 6.0, 7.0]
    assert seen[0][2] == Schedule("linear", 12, 3, 0.6).scale(2)


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(stop: int, tmp_path: Path) -> None:
    whole = pocket_state(dropout=0.3)
    whole_losses: list[Any] = []
    fit(whole, text_batches, 10, [(1, lambda _, m: whole_losses.append(m))], clip_norm=0.5)

    first = pocket_state(dropout=0.3)
    fit(first, text_batches, stop, clip_norm=0.5)
    save_file({k: v.contiguous() for k, v in copied(first.tensors()).items()}, tmp_path / "state.safetensors")
    scalars = first.scalars()
    fit(first, text_batches, stop + 1)  # what happens after the save must not matter

    torch.rand(17)  # nor what the global generator did in between
    second = pocket_state(seed=5, dropout=0.3)
    second.load(load_file(tmp_path / "state.safetensors"), scalars)
    resumed_losses: list[Any] = []
    fit(second, text_batches, 10, [(1, lambda _, m: resumed_losses.append(m))], clip_norm=0.5)
    assert losses_of(resumed_losses) == losses_of(whole_losses)[stop:]
    assert same(second.tensors(), whole.tensors())
    assert second.scalars() == whole.scalars()


@pytest.mark.slow
def test_c50_kill_9_at_any_moment_and_the_same_command_gives_the_same_weights(tmp_path: Path) -> None:
    """A child saves every step under a temporary name and renames; the parent kills it while it trains."""
    child = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from safetensors.torch import load_file, save_file
from train_toy import copied, pocket_state, text_batches
from fledge.train.loop import fit
path = Path(sys.argv[1])
state = pocket_state(12)
found = sorted(path.glob("*.safetensors"))
if found:
    state.load(load_file(found[-1]), {{"step": int(found[-1].stem), "seed": 0}})
def save(state, metrics):
    save_file(copied(state.tensors()), path / "new")
    os.replace(path / "new", path / f"{{state.step:04d}}.safetensors")
    print(state.step, flush=True)
fit(state, text_batches, 12, [(1, save)])
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(folder: Path, kill_after: int | None) -> None:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", child, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if kill_after is not None and int(line) >= kill_after:
                    os.kill(process.pid, signal.SIGKILL)
                    break

    run(tmp_path / "whole", None)
    for kill_after in (2, 7):
        run(tmp_path / "killed", kill_after)
    run(tmp_path / "killed", None)
    name = "0012.safetensors"
    assert same(load_file(tmp_path / "whole" / name), load_file(tmp_path / "killed" / name))


def test_loading_weights_of_another_shape_or_name_is_refused() -> None:
    state = pocket_state()
    tensors = copied(state.tensors())
    with pytest.raises(CheckpointError, match=r"'head.bias' has shape \(3,\), expected \(40,\)"):
        state.load({**tensors, "model/head.bias": torch.zeros(3)}, state.scalars())
    with pytest.raises(CheckpointError, match=r"weight 'extra' is missing from this model"):
        state.load({**tensors, "model/extra": torch.zeros(3)}, state.scalars())
    del tensors["model/head.bias"]
    with pytest.raises(CheckpointError, match=r"'head.bias' is missing from the saved state"):
        state.load(tensors, state.scalars())


def test_a_refused_state_changes_nothing() -> None:
    state = pocket_state()
    fit(state, text_batches, 2)
    before = copied(state.tensors())
    bad = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    with pytest.raises(CheckpointError):
        state.load({**bad, "optimizer/nobody:exp_avg": torch.zeros(2)}, {"step": 9, "seed": 9})
    with pytest.raises(CheckpointError):
        state.load({**bad, "model/head.bias": torch.zeros(3)}, {"step": 9, "seed": 9})
    assert same(before, state.tensors())
    assert state.step == 2
