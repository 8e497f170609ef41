"""Compile where it works, say so where it does not, and never change the mind of a run."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from train_toy import OBJECTIVE, pocket_state, text_rows

import fledge.train.compile as compiling
from fledge.errors import RunError
from fledge.objectives.next_token import NextToken, next_token_sums
from fledge.train.compile import EAGER_COST, compiled, obstacle, resolve

CPU = torch.device("cpu")


@pytest.fixture
def cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "obstacle", lambda device_type: "there is no C++ compiler")


@pytest.fixture
def can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "obstacle", lambda device_type: None)


@pytest.mark.parametrize(
    ("wanted", "recorded", "chosen"),
    [
        (None, None, True),
        (True, None, True),
        (False, None, False),
        (None, False, False),
        (True, False, False),
        (False, True, True),
        (None, True, True),
    ],
)
def test_what_a_run_began_with_wins_over_what_is_wanted(
    can: None, wanted: bool | None, recorded: bool | None, chosen: bool
) -> None:
    assert resolve(wanted, recorded, CPU) is chosen


def test_without_a_compiler_an_open_choice_is_eager_and_its_cost_is_said(
    cannot: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert resolve(None, None, CPU) is False
    assert "no C++ compiler" in caplog.text
    assert EAGER_COST in caplog.text


@pytest.mark.parametrize(("wanted", "recorded"), [(True, None), (None, True), (False, True)])
def test_without_a_compiler_a_demand_or_a_compiled_run_is_refused(
    cannot: None, wanted: bool | None, recorded: bool | None
) -> None:
    with pytest.raises(RunError, match="no C\\+\\+ compiler"):
        resolve(wanted, recorded, CPU)


def test_the_obstacle_names_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "cpp_compiler", lambda: None)
    assert obstacle.__wrapped__("cpu") == "there is no C++ compiler"


def test_a_compiler_is_looked_for_by_cxx_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda name: f"/bin/{name}" if name in ("mine", "c++") else None)
    monkeypatch.setenv("CXX", "mine")
    assert compiling.cpp_compiler() == "/bin/mine"
    monkeypatch.delenv("CXX")
    assert compiling.cpp_compiler() == "/bin/c++"


def test_lanes_that_begin_together_compile_once_and_run_side_by_side_after(monkeypatch: pytest.MonkeyPatch) -> None:
    within, most, meeting = 0, [], threading.Barrier(2)

    def slow(x: int) -> int:
        nonlocal within
        within += 1
        most.append(within)
        if len(most) == 1:
            time.sleep(0.05)  # the compiler's; the other lane must wait meanwhile
        else:
            meeting.wait(timeout=10)  # nobody comes through here alone
        within -= 1
        return x

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    call = compiled(slow)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(call, range(3))) == [0, 1, 2]
    assert most[:2] == [1, 1]


@pytest.mark.slow
def test_one_function_can_be_compiled_for_more_shapes_than_torch_allows_by_default() -> None:
    if obstacle("cpu") is not None:
        pytest.skip("no compiler here")
    double = compiled(lambda x: x * 2)
    for size in range(2, 13):
        assert torch.equal(double(torch.ones(size)), torch.full((size,), 2.0))


@pytest.mark.slow
def test_the_compiled_loss_equals_the_eager_one() -> None:
    if obstacle("cpu") is not None:
        pytest.skip("no compiler here")
    state = pocket_state()
    with torch.no_grad():
        for index, parameter in enumerate(state.model.parameters()):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(index))
    batch = OBJECTIVE.collate(text_rows(0, 4))
    gradients = []
    for objective in (OBJECTIVE, NextToken(16, 1, compiled(next_token_sums))):
        state.optimizers.zero_grad()
        loss = objective.loss(state.model, batch)  # type: ignore[arg-type]
        loss.terms["next_token"].sum.backward()
        gradients.append([loss.terms["next_token"].sum.detach(), loss.stats["accuracy"][0]])
        gradients[-1] += [p.grad.to_dense() for p in state.model.parameters() if p.grad is not None]
    for eager, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-4)
