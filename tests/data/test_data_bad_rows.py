"""Every fault in every format: a row is refused with file, line and reason, or counted where the user says so.

Nothing is dropped in silence, and one bad row never takes its neighbours with it.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fledge.data import interchange
from fledge.data.interchange import FORMATS
from fledge.data.reading import Drops
from fledge.data.records import MAX_CHARS, Intake
from fledge.errors import DataError

LONG = "word " * (MAX_CHARS // 5 + 1)
USER, BOT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
OTHER = {"role": "assistant", "content": "No idea."}
HUMAN_TURN, MODEL_TURN = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}
REPLIES = [
    {"message_id": str(n), "parent_id": "1", "role": "assistant", "text": text, "rank": n - 2, "replies": []}
    for n, text in ((2, "Because."), (3, "No idea."))
]
ARENA = {"model_a": "m1", "model_b": "m2", "winner": "model_a", "judge": "u", "anony": True}


class Row(NamedTuple):
    """A good row of a format; where its texts stand, as paths; keys without which it is nothing; faults of its own."""

    format: str
    good: dict[str, Any]
    texts: tuple[tuple[Any, ...], ...]
    needed: tuple[str, ...]
    faults: tuple[tuple[str, tuple[Any, ...], Any], ...] = ()


RANKED = (
    ("one completion", ("completions",), ["Because."]),
    ("all answers tie", ("ranks",), [1, 1]),
    ("lengths differ", ("ranks",), [1, 2, 3]),
    ("wrong type", ("ranks",), ["first", "second"]),
)
ROWS = {
    "ranking": Row(
        "labels", {"prompt": [USER], "completions": ["Because.", "No idea."], "ranks": [1, 2]},
        (("prompt", 0, "content"), ("completions", 1)), ("completions", "ranks"),
        (*(fault for fault in RANKED if fault[0] != "one completion"),
         ("wrong role", ("prompt",), [USER, BOT]), ("wrong role", ("prompt", 0, "role"), "robot")),
    ),
    "label pair": Row(
        "labels", {"type": "pair", "prompt": [USER], "completions": ["Because.", "No idea."]},
        (("completions", 0),), ("prompt", "completions"),
        (("not two answers", ("completions",), ["Because."]), ("identical answers", ("completions", 1), "Because."),
         ("wrong type", ("probability",), 1.5)),
    ),
    "verdict": Row(
        "labels", {"type": "verdict", "prompt": [USER], "completion": "Because.", "label": True},
        (("completion",),), ("prompt", "completion", "label"), (("wrong type", ("label",), "good"),),
    ),
    "rating": Row(
        "labels", {"type": "rating", "prompt": [USER], "completion": "Because.", "rating": 7},
        (("completion",),), ("prompt", "completion", "rating"), (("wrong type", ("rating",), "high"),),
    ),
    "battle": Row(
        "arena", {**ARENA, "conversation_a": [USER, BOT], "conversation_b": [USER, OTHER]},
        (("conversation_a", 1, "content"),), ("winner", "conversation_b"),
        (("wrong role", ("conversation_a", 1, "role"), "robot"),),
    ),
    "tree": Row(
        "oasst", {"message_tree_id": "1", "prompt": {"message_id": "1", "role": "prompter", "text": "Why?",
                                                     "replies": REPLIES}},
        (("prompt", "text"), ("prompt", "replies", 0, "text")), (),
        (("wrong role", ("prompt", "replies", 0, "role"), "robot"),),
    ),
    "comparison": Row(
        "summaries", {"info": {"id": "t", "post": "Story", "title": "T", "subreddit": "s"},
                      "summaries": [{"text": "one", "policy": "p"}, {"text": "two", "policy": "q"}], "choice": 0,
                      "worker": "w", "batch": "b", "split": "train", "extra": {}},
        (("summaries", 0, "text"), ("info", "post")), ("info", "choice"),
    ),
    "task": Row(
        "self-instruct", {"instruction": "Explain.", "instances": [{"input": "Why?", "output": "Because."}],
                          "is_classification": False},
        (("instruction",), ("instances", 0, "output")), ("is_classification",),
        (("empty text", ("instances",), []),),
    ),
    "openai chat": Row(
        "openai", {"messages": [USER, BOT]}, (("messages", 0, "content"), ("messages", 1, "content")), (),
        (("wrong role", ("messages",), [USER]), ("wrong role", ("messages", 1, "role"), "robot")),
    ),
    "openai preference": Row(
        "openai", {"input": {"messages": [USER]}, "preferred_output": [BOT], "non_preferred_output": [OTHER]},
        (("preferred_output", 0, "content"), ("input", "messages", 0, "content")),
        ("preferred_output", "non_preferred_output"),
        (("identical answers", ("non_preferred_output",), [BOT]),
         ("wrong role", ("input", "messages"), [USER, BOT])),
    ),
    "ground truth": Row(
        "verl", {"data_source": "s", "prompt": [USER], "ability": "a",
                 "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {}},
        (("prompt", 0, "content"),), ("prompt", "reward_model"), (("wrong role", ("prompt",), [USER, BOT]),),
    ),
    "sharegpt": Row(
        "sharegpt", {"conversations": [HUMAN_TURN, MODEL_TURN]},
        (("conversations", 0, "value"), ("conversations", 1, "value")), ("conversations",),
        (("wrong role", ("conversations", 1, "from"), "robot"),),
    ),
    "alpaca": Row("alpaca", {"instruction": "Why?", "input": "", "output": "Because."},
                  (("instruction",), ("output",)), ("output",)),
    "dialogues": Row(
        "hh-rlhf", {"chosen": "\n\nHuman: Why?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
        (("chosen",),), ("rejected",), (("no common prompt", ("chosen",), "\n\nHuman: Why?"),),
    ),
    "prompt as text": Row(
        "ds-chat", {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " Because.", "rejected": " No."},
        (("chosen",), ("rejected",)), ("chosen", "rejected"), (("identical answers", ("rejected",), " Because."),),
    ),
    "messages": Row("trl", {"messages": [USER, BOT]}, (("messages", 1, "content"),), (),
                    (("wrong role", ("messages",), [USER]), ("wrong role", ("messages", 0, "role"), "robot"))),
    "completion": Row("trl", {"prompt": "Why?", "completion": "Because."}, (("prompt",), ("completion",)), ("prompt",)),
    "trl pair": Row(
        "trl", {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        (("prompt",), ("chosen",), ("rejected",)), ("chosen", "rejected"),
        (("identical answers", ("rejected",), "Because."), ("not one answer", ("chosen",), [BOT, BOT])),
    ),
    "unpaired": Row("trl", {"prompt": "Why?", "completion": "Because.", "label": True}, (("completion",),), (),
                    (("wrong type", ("label",), "good"),)),
    "steps": Row("trl", {"prompt": "Why?", "completions": ["One.", "Two."], "labels": [True, False]},
                 (("completions", 0),), ("prompt",), (("lengths differ", ("labels",), [True]),)),
    "prompt": Row("trl", {"prompt": "Why?"}, (("prompt",),), (), (("wrong role", ("prompt",), [USER, BOT]),)),
    "text": Row("trl", {"text": "All about it."}, (("text",),), ()),
}  # fmt: skip


def changed(row: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with another value at a place."""
    copied = copy.deepcopy(row)
    place: Any = copied
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copied


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


def faults() -> list[tuple[str, str, dict[str, Any]]]:
    """(kind of row, reason that is expected, the bad row)."""
    found = []
    for kind, row in ROWS.items():
        for path in row.texts:
            found.append((kind, "text too long", changed(row.good, path, LONG)))
            found.append((kind, "empty text", changed(row.good, path, " \n")))
            found.append((kind, "wrong type", changed(row.good, path, 7)))
        found += [(kind, "missing key", without(row.good, key)) for key in row.needed]
        found += [(kind, reason, changed(row.good, path, value)) for reason, path, value in row.faults]
    return found


def test_every_format_is_tried() -> None:
    assert {row.format for row in ROWS.values()} == {row.name for row in FORMATS}


@pytest.mark.parametrize("kind", ROWS)
def test_the_good_rows_are_good(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[kind].good) + "\n")
    assert list(interchange.read(path, name=ROWS[kind].format))


@pytest.mark.parametrize(
    ("kind", "reason", "bad"), [pytest.param(*f, id=f"{f[0]}: {f[1]} {n}") for n, f in enumerate(faults())]
)
def test_a_bad_row_is_refused_by_line_and_reason_or_counted(
    kind: str, reason: str, bad: dict[str, Any], tmp_path: Path
) -> None:
    row = ROWS[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (row.good, bad, row.good)))
    with pytest.raises(DataError) as caught:
        list(interchange.read(path, name=row.format))
    said = str(caught.value)
    assert "rows.jsonl, line 2" in said
    assert reason in said
    assert "\n" not in said
    assert len(said) < 500
    good = len(list(interchange.read(written(tmp_path, row.good), name=row.format)))
    drops = Drops()
    kept = list(interchange.read(path, Intake(bad=drops), name=row.format))
    assert len(kept) == 2 * good
    assert drops.counts.total() == 1
    assert "line 2" in next(iter(drops.first.values()))


def written(folder: Path, row: dict[str, Any]) -> Path:
    path = folder / "one.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path
