"""Micro-batches side by side give the gradients of the whole batch, the same to the bit every time."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fledge.models.gpt import GPT, GPTConfig
from fledge.models.pocket import Pocket, PocketConfig
from fledge.objectives.next_token import NextToken
from fledge.recipes.training import pairs_of
from fledge.train.lanes import add_gradients, draws, lanes_of, side_by_side
from fledge.train.loop import train_step
from fledge.train.optim import OptimConfig, OptimizerSet
from fledge.types import Piece

VOCAB = 64


@pytest.fixture(autouse=True)
def _two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _rows(count: int) -> list[list[Piece]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 17, count)
    return [[Piece(rng.integers(2, VOCAB, n).astype(np.int32), np.ones(n, np.float32))] for n in lengths]


def _pocket() -> Pocket:
    model = Pocket(PocketConfig.from_depth(1, VOCAB))
    model.init_weights(torch.Generator().manual_seed(0))
    nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def _trained(cuts: int, lanes: int, steps: int = 3) -> tuple[dict[str, Tensor], list[float]]:
    model = _pocket()
    optimizers = OptimizerSet(model, OptimConfig.by_role(0.5))
    objective = NextToken(16, 1)
    losses = [
        train_step(model, optimizers, pairs_of(objective, _rows(9), cuts), lanes=lanes)["loss"] for _ in range(steps)
    ]
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, losses


def test_lanes_learn_what_the_whole_batch_teaches() -> None:
    whole, losses = _trained(cuts=1, lanes=1)
    side, side_losses = _trained(cuts=2, lanes=2)
    assert side_losses == pytest.approx(losses, abs=2e-5)
    for name, tensor in whole.items():
        torch.testing.assert_close(side[name], tensor, atol=2e-4, rtol=0, msg=name)


@pytest.mark.parametrize("cuts", [2, 3])
def test_every_run_gives_the_same_bits(cuts: int) -> None:
    first, second = _trained(cuts, lanes=2)[0], _trained(cuts, lanes=2)[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


def _gradients(cores: int) -> dict[str, Tensor]:
    torch.set_num_threads(cores)
    model = _pocket()
    train_step(model, OptimizerSet(model, OptimConfig.by_role(0.5)), pairs_of(NextToken(16, 1), _rows(9), 2), lanes=2)
    return {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}


def test_lanes_give_the_gradients_that_one_core_gives_one_batch_after_the_other() -> None:
    alone, side = _gradients(cores=1), _gradients(cores=2)
    assert alone.keys() == side.keys()
    assert all(torch.equal(side[name], alone[name]) for name in side)


def test_a_lane_has_its_share_of_the_cores_and_ours_stay_ours() -> None:
    assert side_by_side([torch.get_num_threads] * 2, 2) == [1, 1]
    assert torch.get_num_threads() == 2
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [2]


def test_results_come_in_order_and_an_error_waits_for_the_other_lanes() -> None:
    assert side_by_side([lambda n=n: n * n for n in range(5)], 2) == [0, 1, 4, 9, 16]  # type: ignore[misc]
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def fail() -> None:
        begun.wait(5)
        go_on.set()
        raise ValueError("lane 0")

    def last() -> None:
        begun.set()
        go_on.wait(5)
        ended.set()

    with pytest.raises(ValueError, match="lane 0"):
        side_by_side([fail, last], 2)
    assert ended.is_set()


def test_a_model_with_dropout_goes_one_lane_at_a_time() -> None:
    config = GPTConfig(VOCAB, 16, 32, 1, 2)
    assert lanes_of(GPT(config).train(), 2) == 2
    for name in ("embedding_dropout", "residual_dropout", "attention_dropout"):
        model = GPT(replace(config, **{name: 0.1})).train()  # type: ignore[arg-type]
        assert draws(model), name
        assert lanes_of(model, 2) == 1
        assert lanes_of(model.eval(), 2) == 2


def test_there_are_never_more_lanes_than_cores() -> None:
    torch.set_num_threads(1)
    assert lanes_of(_pocket(), 2) == 1


def test_a_parameter_that_some_lane_does_not_touch_has_the_others_gradient() -> None:
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    add_gradients(weights, [[torch.ones(2), None, None], [torch.ones(2), torch.ones(2), None]])
    assert weights[0].grad is not None
    assert weights[1].grad is not None
    assert weights[0].grad.tolist() == [2, 2]
    assert weights[1].grad.tolist() == [1, 1]
    assert weights[2].grad is None
