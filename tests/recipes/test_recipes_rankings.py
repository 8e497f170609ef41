"""Rankings on disk: whatever a model says must come back as it was."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from fledge.config import to_json
from fledge.recipes.stage_reward import read_rankings
from fledge.types import Conversation, Provenance, Ranking


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x1c", "\x0c", "\r", "\n"])
def test_an_answer_may_hold_any_line_break(tmp_path, mark):
    said = f"one{mark}two"
    provenance = Provenance("tests", "0", "none")
    ranking = Ranking(Conversation.of(("user", said)), (said, "b"), (1, 2), (True, True), ("human", "sft"), provenance)
    path = tmp_path / "rankings" / "reward.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(to_json(ranking), ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rankings(SimpleNamespace(run=tmp_path), "reward") == [ranking]
