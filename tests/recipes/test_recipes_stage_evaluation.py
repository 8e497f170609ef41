"""The evaluation stage: what answers are measured with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fledge.recipes import stage_evaluation
from fledge.types import Completion


def test_kl_is_read_in_rows_that_hold_the_longest_prompt_and_the_longest_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[int] = []
    monkeypatch.setattr(stage_evaluation, "_scorer", lambda loaded, row_length: rows.append(row_length))
    monkeypatch.setattr(stage_evaluation.generation, "evaluate_kl", lambda *given: {"kl_k1_answer": 0.0})
    context: Any = SimpleNamespace(plan=SimpleNamespace(ppo=SimpleNamespace(response_length=300)))
    found: Any = [SimpleNamespace(ids=(1,) * length) for length in (5, 9, 7)]
    answers = {stage: [Completion("a", (3,), (-1.0,), "length")] * 3 for stage in ("sft", "ppo", "control")}
    measured = stage_evaluation._manners(context, dict.fromkeys(answers), found, answers)  # type: ignore[arg-type]
    assert rows == [309, 309, 309]
    assert [stage for stage in answers if "kl_k1_answer" in measured[stage]] == ["ppo", "control"]
