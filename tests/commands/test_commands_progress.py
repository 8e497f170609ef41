"""How a run is shown while it goes on: what each stage is known by, how fast it goes, how long it still takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fledge.commands import progress
from fledge.commands.progress import SHOWN, JsonLines, Lines, duration

METRICS_PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the lines see; tests set it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_says_stage_rate_loss_and_time_left(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    lines = Lines()
    lines.step("pretrain", 1, 101, {"loss": 8.0, "tokens_per_second": 9000.0})
    clock[0] += 20.0
    lines.step("pretrain", 41, 101, {"loss": 3.25, "tokens_per_second": 9000.0, "grad_norm": 1.0})
    said = capsys.readouterr().err.splitlines()[-1]
    assert " ".join(said.split()) == "pretrain 41/101 2.0 steps/s loss 3.25 tokens_per_second 9000 0:30 left"


def test_a_round_of_ppo_is_known_by_its_reward_and_its_kl(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    Lines().step("ppo", 3, 20, {"loss": 2.5, "score_mean": -0.75, "kl": 4.5, "beta": 0.05})
    said = capsys.readouterr().err
    assert "score_mean -0.75" in said
    assert "kl 4.5" in said


def test_what_is_shown_are_metrics_that_exist() -> None:
    page = METRICS_PAGE.read_text(encoding="utf-8")
    assert [name for name in SHOWN if f"| `{name}` |" not in page] == []


def test_lines_in_a_log_come_now_and_then_and_at_the_end(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    lines = Lines()
    for step in range(1, 51):
        clock[0] += 1.0
        lines.step("sft", step, 50, {})
    shown = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["1/50", "11/50", "21/50", "31/50", "41/50", "50/50"]


def test_events_are_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    told = JsonLines()
    told.stage("ppo", "started", "")
    told.step("ppo", 1, 20, {"kl": 0.5})
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"event": "stage", "stage": "ppo", "status": "started", "note": ""}
    assert second == {"event": "step", "stage": "ppo", "step": 1, "num_steps": 20, "kl": 0.5}


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (754.0, "12:34"), (3661.0, "1:01:01")])
def test_durations_read_as_on_a_clock(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
