"""Schedules by their known values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.train.schedule import Schedule


def test_linear_is_a_trapezoid() -> None:
    schedule = Schedule("linear", 100, warmup_steps=10, cooldown=0.5)
    assert [schedule.scale(step) for step in (0, 4, 9, 10, 50)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert [schedule.scale(step) for step in (75, 99, 100, 200)] == pytest.approx([0.5, 0.02, 0, 0])


def test_cosine_falls_to_a_tenth_as_instructgpt_has_it() -> None:
    schedule = Schedule("cosine", 100, final=0.1)
    assert [schedule.scale(step) for step in (0, 50, 100, 150)] == pytest.approx([1, 0.55, 0.1, 0.1])


def test_constant_warms_up_over_ten_steps_from_a_tenth_as_instructgpt_has_it() -> None:
    schedule = Schedule("constant", 100, warmup_steps=10)
    assert [schedule.scale(step) for step in (0, 9, 10, 99, 500)] == pytest.approx([0.1, 1, 1, 1, 1])


@given(
    kind=st.sampled_from(["linear", "cosine", "constant"]),
    num_steps=st.integers(1, 200),
    warmup=st.floats(0, 1),
    cooldown=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_no_step_is_lost_at_zero_or_above_the_peak(
    kind: str, num_steps: int, warmup: float, cooldown: float, final: float
) -> None:
    schedule = Schedule(kind, num_steps, int(warmup * num_steps), cooldown, final)  # type: ignore[arg-type]
    scales = [schedule.scale(step) for step in range(num_steps)]
    assert all(0 <= scale <= 1 + 1e-12 for scale in scales)
    assert scales[0] > 0
    rising, falling = scales[: schedule.warmup_steps], scales[schedule.warmup_steps :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("bad", [{"num_steps": 0}, {"warmup_steps": 11}, {"cooldown": 1.5}, {"final": -0.1}])
def test_impossible_schedules_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Schedule(**{"kind": "linear", "num_steps": 10, **bad})  # type: ignore[arg-type]


def test_a_cooldown_longer_than_what_the_warmup_leaves_starts_from_the_peak() -> None:
    schedule = Schedule("linear", 10, warmup_steps=5, cooldown=1.0)
    assert [schedule.scale(step) for step in (4, 5, 6, 9)] == pytest.approx([1, 1, 0.8, 0.2])
