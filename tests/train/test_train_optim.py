"""Optimizers by role: fast ones beside torch's slow twins, state by name, roles reset alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from train_toy import copied, pocket_state, same, text_batches

from fledge.config import from_json, to_json
from fledge.errors import CheckpointError
from fledge.train.loop import fit
from fledge.train.muon import Muon, orthogonalised
from fledge.train.optim import OptimConfig, OptimizerSet, Rule
from fledge.train.rows import RowAdam

JORDAN = (3.4445, -4.7750, 2.0315)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def newton_schulz(x: torch.Tensor, num_iterations: int) -> torch.Tensor:
    """The iteration as Jordan writes it, one matrix, in float64."""
    a, b, c = JORDAN
    x = x.double()
    flip = x.shape[0] > x.shape[1]
    x = x.mT if flip else x
    x = x / x.norm()
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if flip else x


@pytest.mark.parametrize("shape", [(8, 8), (8, 11), (8, 12), (8, 32), (32, 8), (12, 8), (1, 5)])
@pytest.mark.parametrize("num_iterations", [0, 1, 3, 5])
def test_orthogonalised_is_newton_schulz_whatever_the_shape(shape: tuple[int, int], num_iterations: int) -> None:
    batch = drawn(3, *shape)
    for fast, slow in zip(orthogonalised(batch, JORDAN, num_iterations), batch, strict=True):
        torch.testing.assert_close(fast.double(), newton_schulz(slow, num_iterations), rtol=1e-4, atol=1e-4)


def test_orthogonalised_singular_values_are_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalised(drawn(2, 16, 48), JORDAN, 5))
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3


def test_a_zero_gradient_is_orthogonalised_to_zero() -> None:
    assert float(orthogonalised(torch.zeros(2, 4, 8), JORDAN, 5).abs().sum()) == 0.0


def test_muon_follows_torch_muon_as_closely_as_bfloat16_allows() -> None:
    shapes = [(16, 16), (16, 16), (16, 48), (48, 16)]
    mine = [nn.Parameter(drawn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    fast, slow = Muon(mine, **options), torch.optim.Muon(theirs, **options)
    start = [p.detach().clone() for p in mine]
    for step in range(4):
        for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            a.grad = drawn(*a.shape, seed=100 * step + index)
            b.grad = a.grad.clone()
        fast.step()
        slow.step()
    for a, b, before in zip(mine, theirs, start, strict=True):
        moved = (b - before).detach().norm()
        assert float((a - b).detach().norm() / moved) < 0.02
        assert float(moved) > 0.1


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="2D"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


@settings(max_examples=15, deadline=None)
@given(visits=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5))
def test_row_adam_equals_sparse_adam(visits: list[list[int]]) -> None:
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
    mine, theirs = (nn.Embedding.from_pretrained(drawn(10, 4), freeze=False, sparse=True) for _ in range(2))
    fast, slow = (
        RowAdam(mine.parameters(), **options),
        torch.optim.SparseAdam(list(theirs.parameters()), **options),
    )  # type: ignore[arg-type]
    for step, rows in enumerate(visits):
        for table in (mine, theirs):
            table.weight.grad = None
            (table(torch.tensor(rows)) * drawn(len(rows), 4, seed=step)).sum().backward()
        fast.step()
        slow.step()
    torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-5, atol=1e-6)
    untouched = sorted(set(range(10)) - {row for rows in visits for row in rows})
    assert torch.equal(mine.weight[untouched], drawn(10, 4)[untouched])


def test_row_adam_takes_a_dense_gradient_as_one_that_touches_every_row() -> None:
    dense, sparse = nn.Parameter(drawn(5, 3)), nn.Parameter(drawn(5, 3))
    optimizers = [RowAdam([p], lr=0.1) for p in (dense, sparse)]
    gradient = drawn(5, 3, seed=1)
    dense.grad = gradient
    sparse.grad = gradient.to_sparse(1)  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(dense, sparse)


def test_state_travels_by_name_not_by_order() -> None:
    class Pair(nn.Module):
        def __init__(self, names: tuple[str, str]) -> None:
            super().__init__()
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.ones(2, 2)))

        def roles(self) -> dict[str, str]:
            return {"a": "matrix", "b": "head"}

    one, other = Pair(("a", "b")), Pair(("b", "a"))
    sets = [OptimizerSet(model, OptimConfig.adamw(0.1)) for model in (one, other)]
    for name, parameter in one.named_parameters():
        parameter.grad = torch.full((2, 2), 1.0 if name == "a" else 5.0)
    sets[0].step()
    sets[1].load_tensors(sets[0].tensors())
    assert same(sets[0].tensors(), sets[1].tensors())
    assert sets[1].tensors().keys() == {f"{n}:{s}" for n in "ab" for s in ("step", "exp_avg", "exp_avg_sq")}


def test_loaded_state_is_a_copy() -> None:
    state = pocket_state()
    fit(state, text_batches, 2)
    tensors = copied(state.tensors())
    other = pocket_state()
    other.load(tensors, state.scalars())
    kept = copied(tensors)
    fit(other, text_batches, 4)
    assert same(tensors, kept)


def test_state_of_an_unknown_parameter_or_shape_is_refused() -> None:
    optimizers = pocket_state().optimizers
    with pytest.raises(CheckpointError, match="'nobody:exp_avg' belongs to no trainable parameter"):
        optimizers.load_tensors({"nobody:exp_avg": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"'head\.bias:exp_avg' has shape"):
        optimizers.load_tensors({"head.bias:exp_avg": torch.zeros(2)})


def test_resetting_a_role_forgets_its_moments_and_no_others() -> None:
    state = pocket_state()
    fit(state, text_batches, 2)
    before = copied(state.optimizers.tensors())
    state.optimizers.reset_role("table")
    after = state.optimizers.tensors()
    assert not any(key.startswith("tables.") for key in after)
    assert same(after, {key: value for key, value in before.items() if not key.startswith("tables.")})
    fit(state, text_batches, 3)
    assert float(state.optimizers.tensors()["tables.0.weight:step"]) == 1.0


def test_the_scale_reaches_every_rate() -> None:
    optimizers = pocket_state().optimizers
    optimizers.set_scale(0.25)
    rates = {role: opt.param_groups[0]["lr"] for role, opt in optimizers._optimizers.items()}
    peaks = OptimConfig.by_role(0.3)
    assert rates == pytest.approx({role: getattr(peaks, role).lr / 4 for role in rates})


def test_scale_zero_leaves_weights_untouched_bit_for_bit() -> None:
    state = pocket_state()
    fit(state, text_batches, 1)
    before = copied(dict(state.model.named_parameters()))
    state.optimizers.set_scale(0.0)
    state.optimizers.step()
    assert same(before, dict(state.model.named_parameters()))


def test_a_parameter_without_a_role_is_refused_by_name() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="parameter bias has role 'knob'; known are matrix, embedding"):
        OptimizerSet(model, OptimConfig.adamw(0.1), {"weight": "matrix", "bias": "knob"})


def test_a_model_that_is_wholly_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match="every parameter of this Linear is frozen: there is nothing to train"):
        OptimizerSet(nn.Linear(2, 2).requires_grad_(False), OptimConfig.adamw(0.1), {})


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizers = OptimizerSet(model, OptimConfig.adamw(0.1), {"weight": "matrix"})
    model(torch.ones(1, 2)).sum().backward()
    optimizers.step()
    assert {key.split(":")[0] for key in optimizers.tensors()} == {"weight"}


def test_only_matrices_decay_under_adamw() -> None:
    config = OptimConfig.adamw(0.1, decay=0.2)
    assert config.matrix.decay == 0.2
    assert config.embedding.decay == config.head.decay == config.gain.decay == config.table.decay == 0.0


def test_a_decaying_row_table_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot decay"):
        Rule("rows", 0.1, decay=0.1)


@pytest.mark.parametrize("config", [OptimConfig.adamw(0.1), OptimConfig.by_role()])
def test_configs_survive_json(config: OptimConfig) -> None:
    assert from_json(OptimConfig, to_json(config)) == config
    assert from_json(OptimConfig, to_json(replace(config, table=Rule("rows", 0.3)))).table.lr == 0.3


def test_gradient_norm_counts_a_row_looked_up_twice_once() -> None:
    """Two look-ups of one row add up before the norm: |g + g|, not sqrt(|g|^2 + |g|^2)."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(4, 2, sparse=True)

        def roles(self) -> dict[str, str]:
            return {"rows.weight": "table"}

    model = Table()
    optimizers = OptimizerSet(model, OptimConfig.adamw(0.1))
    model.rows(torch.tensor([1, 1])).sum().backward()
    assert optimizers.clip(None) == pytest.approx(8**0.5)
