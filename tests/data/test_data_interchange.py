"""Every alignment format: what is written is read back, formats are recognised, and bad rows are named or counted."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from feedback_samples import HOLDS, ORIGIN, QUESTION, TOOL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge.data import interchange, llama_factory
from fledge.data.feedback import FeedbackExample, answers_of, prompt_of
from fledge.data.interchange import FORMATS, format_named, records_of
from fledge.data.labels import pairs_of
from fledge.data.reading import Drops
from fledge.data.records import Intake
from fledge.errors import DataError
from fledge.types import (
    CallPart,
    ChatExample,
    Conversation,
    Message,
    PairExample,
    PromptExample,
    Provenance,
    Ranking,
    RatedExample,
    UnpairedExample,
)

SHARED = Path(__file__).parents[3] / "shared/data"
BLANK = Provenance("", "", "")
quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def wrote(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_one(tmp_path: Path, row: object, name: str | None = None) -> FeedbackExample:
    [example] = interchange.read(wrote(tmp_path / "rows.jsonl", [row]), name=name)
    return example


def refusal(tmp_path: Path, *rows: object, name: str | None = None, intake: Intake | None = None) -> str:
    with pytest.raises(DataError) as caught:
        list(interchange.read(wrote(tmp_path / "rows.jsonl", rows), intake, name=name))
    said = str(caught.value)
    assert "\n" not in said
    return said


# Round trips.


def test_every_format_has_examples_that_it_must_hold() -> None:
    assert set(HOLDS) == {row.name for row in FORMATS}


@pytest.mark.parametrize("name", HOLDS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_what_is_written_is_recognised_and_read_back(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    keeps_origin = format_named(name).keeps_origin

    @quick
    @given(st.lists(HOLDS[name], min_size=1, max_size=3))
    def check(examples: list[FeedbackExample]) -> None:
        assert interchange.write(path, examples, name=name) == len(examples)
        back = list(interchange.read(path, Intake(), name=None if name != "openai" else name))
        if not keeps_origin:
            examples, back = ([replace(e, provenance=BLANK) for e in some] for some in (examples, back))
        assert [example for example in back if example in examples] == examples or name == "oasst"
        assert all(example in back for example in examples)
        assert len(back) == len(examples) or name == "oasst"  # a ranking's tree also holds a conversation

    check()


@pytest.mark.parametrize("name", ["trl", "verl", "labels"])
def test_parquet_holds_what_json_holds(name: str, tmp_path: Path) -> None:
    @settings(quick, max_examples=25)
    @given(HOLDS[name])
    def check(example: FeedbackExample) -> None:
        path = tmp_path / "data.parquet"
        interchange.write(path, [example], name=name)
        [back] = interchange.read(path, name=name)
        assert back == example or replace(back, provenance=BLANK) == replace(example, provenance=BLANK)

    check()


def test_parquet_rows_of_different_shape_keep_their_own_facts(tmp_path: Path) -> None:
    some = [
        PromptExample(QUESTION, ORIGIN, "4", "gsm8k", {"style": "rule", "index": 1}),
        PromptExample(QUESTION, ORIGIN, "x", "other", {"style": "rule", "note": {"deep": "yes"}}),
    ]
    interchange.write(tmp_path / "a.parquet", some, name="verl")
    back = list(interchange.read(tmp_path / "a.parquet"))
    assert [replace(e, provenance=ORIGIN) for e in back] == some


def test_an_example_that_a_format_would_alter_is_refused_not_altered() -> None:
    tricky = PairExample(QUESTION, "yes\n\nHuman: and now?", "no", ORIGIN)
    for name in ("hh-rlhf", "ds-chat"):
        if name == "hh-rlhf":
            with pytest.raises(DataError, match="cannot be written as"):
                records_of(tricky, format_named(name))
    spaced = PairExample(QUESTION, " yes", "no", ORIGIN)
    with pytest.raises(DataError, match="read back as something else"):
        records_of(spaced, format_named("ds-chat"))
    with pytest.raises(DataError, match="cannot be written as alpaca"):
        records_of(replace(spaced, probability=0.7), format_named("alpaca"))
    with pytest.raises(DataError, match="cannot be written as verl"):
        records_of(spaced, format_named("verl"))


def test_a_refused_example_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    path = wrote(tmp_path / "data.jsonl", [{"old": 1}])
    with pytest.raises(DataError):
        interchange.write(
            path, [PairExample(QUESTION, "a", "b", ORIGIN), PromptExample(QUESTION, ORIGIN)], name="hh-rlhf"
        )
    assert path.read_text() == '{"old": 1}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["data.jsonl"]


# Each format as its makers publish it.


def test_trl_takes_texts_and_messages_alike(tmp_path: Path) -> None:
    plain = read_one(tmp_path, {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."})
    assert isinstance(plain, PairExample)
    assert (plain.prompt, plain.chosen) == (Conversation.of(("user", "The sky is")), " blue.")
    said = [{"role": "user", "content": "Hi"}]
    a, b = ([*said, {"role": "assistant", "content": text}] for text in ("Hello", "Go"))
    for row in ({"chosen": a, "rejected": b}, {"prompt": "Hi", "chosen": a, "rejected": b, "messages": a}):
        assert replace(read_one(tmp_path, row), provenance=ORIGIN) == PairExample(
            Conversation.of(("user", "Hi")), "Hello", "Go", ORIGIN
        )
    implicit = read_one(tmp_path, {"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert isinstance(implicit, PairExample)
    assert (implicit.prompt.messages[0].text, implicit.chosen, implicit.rejected) == ("The sky is", "blue.", "green.")


def test_trl_reads_margin_and_scores_and_tools(tmp_path: Path) -> None:
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 1.5, "score_chosen": 8, "score_rejected": 3}
    pair = read_one(tmp_path, row | {"tools": [json.loads(TOOL)]})
    assert isinstance(pair, PairExample)
    assert (pair.margin, pair.scores, pair.prompt.tools) == (1.5, (8.0, 3.0), (TOOL,))


def test_only_the_completion_of_a_prompt_completion_is_learned(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    chat = read_one(tmp_path, {"prompt": turns, "completion": [{"role": "assistant", "content": "d"}]})
    assert isinstance(chat, ChatExample)
    assert [m.text for m in chat.conversation.messages if m.is_learned] == ["d"]


def test_tool_calls_are_read_nested_and_flat_with_arguments_as_object_or_text(tmp_path: Path) -> None:
    nested = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    flat = {"name": "look", "arguments": {"at": 1}}
    turns = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": None, "tool_calls": [nested, flat]},
        {"role": "tool", "tool_call_id": "c1", "content": "seen"},
        {"role": "assistant", "content": "done"},
    ]
    chat = read_one(tmp_path, {"messages": turns})
    assert isinstance(chat, ChatExample)
    assert chat.conversation.messages[1].parts == (CallPart("look", '{"at": 1}', "c1"), CallPart("look", '{"at": 1}'))
    assert chat.conversation.messages[2].call_id == "c1"
    assert '"name": "look"' in chat.conversation.messages[1].text


def test_kwise_rows_with_ties_labelers_and_logprobs_are_rankings(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "Q"}],
        "completions": ["a", "b", "c", "d"],
        "ranks": [1, 2, 2, 4],
        "labeler": 17,
        "policy_version": "sft-3",
        "logprobs": [[-1.0], [-2.0, -0.5], [], [-3]],
    }
    ranking = read_one(tmp_path, row)
    assert isinstance(ranking, Ranking)
    assert ranking.ranks == (1, 2, 2, 4)
    assert ranking.makers == ("sft-3",) * 4
    assert ranking.judgement is not None
    assert (ranking.judgement.labeler, ranking.judgement.kind) == ("17", "human")
    assert ranking.logprobs == ((-1.0,), (-2.0, -0.5), (), (-3.0,))


def test_a_ranking_of_four_with_a_tie_gives_five_pairs_better_first() -> None:
    ranking = Ranking(QUESTION, ("a", "b", "c", "d"), (2, 1, 2, 4), (True,) * 4, ("m",) * 4, ORIGIN, shown=(4, 3, 2, 1))
    found = {(pair.chosen, pair.rejected): pair.shown_first for pair in pairs_of(ranking)}
    assert found == {
        ("b", "a"): "chosen",
        ("b", "c"): "rejected",
        ("b", "d"): "rejected",
        ("a", "d"): "rejected",
        ("c", "d"): "rejected",
    }


def test_alpaca_joins_instruction_and_input_and_keeps_history(tmp_path: Path) -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "S", "history": [["hi", "hello"]]}
    chat = read_one(tmp_path, row)
    assert isinstance(chat, ChatExample)
    assert chat.conversation == Conversation.of(
        ("system", "S"), ("user", "hi"), ("assistant", "hello"), ("user", "Add\n1 2"), ("assistant", "3")
    )
    tagged = read_one(tmp_path, {"instruction": "Add", "output": "4", "kto_tag": False})
    assert isinstance(tagged, UnpairedExample)
    assert not tagged.is_desirable


def test_sharegpt_calls_and_observations_and_tag(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "look"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": 1}}'},
        {"from": "observation", "value": "seen"},
        {"from": "gpt", "value": "done"},
    ]
    example = read_one(tmp_path, {"conversations": turns, "kto_tag": True, "tools": f"[{TOOL}]"})
    assert isinstance(example, UnpairedExample)
    assert example.is_desirable
    assert example.completion == "done"
    assert example.prompt.tools == (TOOL,)
    assert example.prompt.messages[1].parts == (CallPart("look", '{"at": 1}'),)
    assert example.prompt.messages[2].role == "tool"


def test_dialogues_of_deepspeed_chat_in_both_dialects(tmp_path: Path) -> None:
    one = read_one(tmp_path, {"prompt": "Human: Why? Assistant:", "chosen": " So.", "rejected": " No."})
    assert isinstance(one, PairExample)
    assert (one.prompt, one.chosen) == (Conversation.of(("user", "Why?")), "So.")
    several = read_one(
        tmp_path,
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "chosen": "d", "rejected": "e"},
    )
    assert isinstance(several, PairExample)
    assert [m.text for m in several.prompt.messages] == ["a", "b", "c"]


def test_openai_weights_make_answers_context_and_preferences_pairs(tmp_path: Path) -> None:
    turns = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 1},
    ]
    chat = read_one(tmp_path, {"messages": turns})
    assert isinstance(chat, ChatExample)
    assert [m.is_learned for m in chat.conversation.messages] == [True, True, False, True, True]
    assert chat.conversation.messages[0].role == "system"
    assert records_of(chat, format_named("openai"))[0]["messages"][2]["weight"] == 0
    pair = read_one(
        tmp_path,
        {
            "input": {"messages": [{"role": "user", "content": "Q"}]},
            "preferred_output": [{"role": "assistant", "content": "A"}],
            "non_preferred_output": [{"role": "assistant", "content": "B"}],
        },
    )
    assert isinstance(pair, PairExample)
    assert (pair.chosen, pair.rejected) == ("A", "B")


def test_summaries_comparison_and_rating(tmp_path: Path) -> None:
    info = {"id": "t3", "post": "Long story", "title": "T", "subreddit": "tifu"}
    row = {
        "info": info,
        "summaries": [{"text": " one", "policy": "sup1"}, {"text": " two", "policy": "ref", "note": ""}],
        "choice": 1,
        "worker": "w",
        "batch": "b",
        "split": "valid2",
        "extra": {"confidence": 8},
    }
    ranking = read_one(tmp_path, row)
    assert isinstance(ranking, Ranking)
    assert (ranking.ranks, ranking.makers) == ((2, 1), ("sup1", "ref"))
    assert ranking.prompt.messages[0].text == "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: Long story\n\nTL;DR:"
    assert ranking.judgement is not None
    assert (ranking.judgement.labeler, ranking.judgement.confidence, ranking.judgement.batch) == ("w", 8.0, "b")
    assert ranking.provenance.source == "user/valid2"
    axes = {"summary": {"text": "s", "policy": "p", "axes": {"overall": 7, "accuracy": 6}}, "worker": "w"}
    rated = read_one(tmp_path, {"info": info, **axes})
    assert isinstance(rated, RatedExample)
    assert (rated.rating, rated.maker) == (7.0, "p")


def test_verl_ground_truth_that_is_no_text_becomes_json_text(tmp_path: Path) -> None:
    row = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "2+2?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": 4},
        "extra_info": {"index": 3},
    }
    example = read_one(tmp_path, row)
    assert isinstance(example, PromptExample)
    assert (example.answer, example.task) == ("4", "openai/gsm8k")
    assert example.extra == {"style": "rule", "ability": "math", "index": 3}


def node(identity: str, parent: str | None, role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"message_id": identity, "parent_id": parent, "role": role, "text": text, **more}


TREE = [
    node("1", None, "prompter", "Q"),
    node("2", "1", "assistant", "worse", rank=1, synthetic=True, model_name="m"),
    node("3", "1", "assistant", "better", rank=0),
    node("4", "1", "assistant", "gone", rank=2, deleted=True),
    node("5", "3", "prompter", "and then?"),
    node("6", "5", "assistant", "refused", review_result=False),
]


def nested(identity: str = "1") -> dict[str, Any]:
    [mine] = [row for row in TREE if row["message_id"] == identity]
    return {**mine, "replies": [nested(row["message_id"]) for row in TREE if row["parent_id"] == identity]}


@pytest.mark.parametrize("rows", [TREE[::-1], [{"message_tree_id": "1", "prompt": nested()}]], ids=["flat", "nested"])
def test_a_tree_gives_its_best_conversation_and_a_ranking_without_the_deleted(rows: list[Any], tmp_path: Path) -> None:
    chat, ranking = interchange.read(wrote(tmp_path / "trees.jsonl", rows))
    assert isinstance(chat, ChatExample)
    assert isinstance(ranking, Ranking)
    assert [m.text for m in chat.conversation.messages] == ["Q", "better"]
    assert (ranking.completions, ranking.ranks, ranking.makers) == (("better", "worse"), (1, 2), ("human", "m"))


def test_a_message_whose_parent_is_not_in_the_file_is_refused_or_counted(tmp_path: Path) -> None:
    rows = [*TREE, node("7", "nowhere", "assistant", "lost"), node("8", "7", "prompter", "and?")]
    assert "line 7: no parent: no message has the id 'nowhere'" in refusal(tmp_path, *rows)
    bad = Drops()
    found = list(interchange.read(wrote(tmp_path / "rows.jsonl", rows), Intake(bad=bad)))
    assert [type(example) for example in found] == [ChatExample, Ranking]
    assert bad.counts == {"no parent": 1}


def test_arena_battles_won_tied_and_about_different_talks(tmp_path: Path) -> None:
    def battle(winner: str, first: str = "same") -> dict[str, Any]:
        def talk(middle: str, last: str) -> list[dict[str, str]]:
            texts = [("user", "a"), ("assistant", middle), ("user", "b"), ("assistant", last)]
            return [{"role": role, "content": text} for role, text in texts]

        sides = {"conversation_a": talk("same", "x"), "conversation_b": talk(first, "y")}
        return {"model_a": "m1", "model_b": "m2", "winner": winner, "judge": "u", "anony": True, **sides}

    won = read_one(tmp_path, battle("model_b"))
    assert isinstance(won, Ranking)
    assert (won.ranks, won.makers) == ((2, 1), ("m1", "m2"))
    tied = read_one(tmp_path, battle("tie (bothbad)"))
    assert isinstance(tied, PairExample)
    assert tied.probability == 0.5
    assert "different conversations before their last answers" in refusal(tmp_path, battle("model_a", "other"))


def test_the_data_sets_of_a_description_are_read_by_its_columns_and_tags(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps([{"ask": "Q", "say": "A", "input": "unused"}, {"ask": "R", "say": "B"}])
    )
    wrote(tmp_path / "b.jsonl", [{"talk": [{"who": "U", "text": "hi"}, {"who": "A", "text": "yo"}]}])
    wrote(tmp_path / "c.jsonl", [{"body": "prose"}])
    tags = {"role_tag": "who", "content_tag": "text", "user_tag": "U", "assistant_tag": "A"}
    described = {
        "a": {"file_name": "a.json", "columns": {"prompt": "ask", "response": "say"}, "num_samples": 1},
        "b": {"file_name": "b.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags},
        "c": {"file_name": "c.jsonl", "columns": {"prompt": "body"}},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(described))
    found = list(interchange.read(tmp_path))
    assert [(e.provenance.source, answers_of(e)) for e in found] == [
        ("user/a", ("A",)),
        ("user/b", ("yo",)),
        ("user/c", ()),
    ]
    assert prompt_of(found[0]).messages[-1].text == "Q"
    assert llama_factory.names(tmp_path / "dataset_info.json") == ["a", "b", "c"]
    for entry, said in (
        ({"hf_hub_url": "x/y"}, "names no file"),
        ({"file_name": "a.json", "columns": {"images": "i"}}, "images is not understood"),
        ({"file_name": "a.json", "folder": "x"}, "folder is not understood"),
        ({"file_name": "a.json", "formatting": "xml"}, "'xml'"),
    ):
        (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry}))
        with pytest.raises(DataError, match=said):
            list(interchange.read(tmp_path))


@pytest.mark.parametrize("kind", ["chats", "pairs", "verdicts"])
def test_a_data_set_added_to_a_description_is_read_back(kind: str, tmp_path: Path) -> None:
    some: list[FeedbackExample] = {
        "chats": [ChatExample(QUESTION.then("assistant", "A"), ORIGIN)],
        "pairs": [PairExample(QUESTION, "A", "B", ORIGIN)],
        "verdicts": [UnpairedExample(QUESTION, "A", False, ORIGIN)],
    }[kind]
    llama_factory.write(tmp_path, "mine", some)
    llama_factory.write(tmp_path, "more", some)
    back = list(llama_factory.read(tmp_path / "dataset_info.json", Intake(), ["more"]))
    assert [replace(e, provenance=ORIGIN) for e in back] == some


# Recognition.


def test_a_packed_file_is_read_like_a_plain_one(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "Q", "chosen": "A", "rejected": "B"})
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(row + "\n")
    [pair] = interchange.read(tmp_path / "a.jsonl.gz")
    assert isinstance(pair, PairExample)
    (tmp_path / "b.jsonl.gz").write_text(row)
    with pytest.raises(DataError, match="no gzip file"):
        list(interchange.read(tmp_path / "b.jsonl.gz"))
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(DataError, match="damaged"):
        list(interchange.read(tmp_path / "c.jsonl.gz"))


def test_keys_that_no_format_has_are_named(tmp_path: Path) -> None:
    said = refusal(tmp_path, {"question": "Q", "reply": "A"})
    assert "line 1" in said
    assert "question, reply" in said
    with pytest.raises(DataError, match="did you mean 'alpaca'"):
        format_named("alpacca")


def test_files_that_hold_nothing_or_are_of_another_kind_are_refused(tmp_path: Path) -> None:
    assert "no usable row" in refusal(tmp_path)
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match="no known kind"):
        list(interchange.read(tmp_path / "a.csv"))
    with pytest.raises(DataError, match="no kind that is written"):
        interchange.write(tmp_path / "a.csv", [])


# Bad rows: refused with file, line and reason, or counted.

USER, BOT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
BAD = {
    "missing key": {"prompt": "Q", "chosen": "A"},
    "one completion": {"prompt": "Q", "completions": ["a"], "ranks": [1]},
    "all answers tie": {"prompt": "Q", "completions": ["a", "b"], "ranks": [1, 1]},
    "lengths differ": {"prompt": "Q", "completions": ["a", "b"], "ranks": [1, 2, 3]},
    "empty text": {"prompt": "Q", "chosen": " \n", "rejected": "b"},
    "text too long": {"prompt": "Q", "chosen": "word " * 100_000, "rejected": "b"},
    "wrong role": {"messages": [USER, {"role": "robot", "content": "A"}]},
    "identical answers": {"prompt": "Q", "chosen": "a", "rejected": "a"},
    "wrong type": {"prompt": "Q", "chosen": 3, "rejected": "a"},
    "not one answer": {"prompt": "Q", "chosen": [BOT, BOT], "rejected": "a"},
    "undecodable text": {"prompt": "Q\ud800", "chosen": "b", "rejected": "a"},
    "not an object": [1, 2],
}


def test_a_value_that_is_null_is_said_to_be_null_not_to_be_no_key(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Q", "chosen": None, "rejected": "B"}) + "\n")
    with pytest.raises(DataError, match=r"line 1: missing key: 'chosen' is null; fill it in"):
        list(interchange.read(path))
    path.write_text(json.dumps({"prompt": None, "tools": []}) + "\n")
    with pytest.raises(DataError, match=r"line 1: missing key: its keys with a value are tools, expected messages"):
        list(interchange.read(path, name="trl"))


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_refused_with_file_line_and_reason_or_counted(reason: str, tmp_path: Path) -> None:
    good = {"prompt": "Q", "completions": ["a", "b"], "ranks": [1, 2]}
    if "completions" not in BAD[reason]:
        good = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, BAD[reason], good)))
    with pytest.raises(DataError, match=rf"rows.jsonl, line 2.*: {reason}: ") as caught:
        list(interchange.read(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    bad = Drops()
    assert len(list(interchange.read(path, Intake(bad=bad)))) == 2
    assert bad.counts == {reason: 1}
    assert "line 2" in bad.first[reason]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER]},
        {"prompt": [USER, BOT]},
        {"prompt": [USER], "completion": [USER]},
        {"messages": [USER, {"role": "user", "content": "x", "tool_calls": [{"name": "f", "arguments": {}}]}]},
    ],
)
def test_turns_in_the_wrong_role_are_refused(row: dict[str, Any], tmp_path: Path) -> None:
    assert "wrong role" in refusal(tmp_path, row)


def test_lines_that_are_no_json_are_named_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n{"text": "b"}\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        list(interchange.read(path))
    bad = Drops()
    assert len(list(interchange.read(path, Intake(bad=bad)))) == 2
    assert bad.counts == {"not JSON": 1}


def test_rows_of_an_array_are_named_by_the_line_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n {"text": "a"},\n\n {"text":\n 3}\n]')
    with pytest.raises(DataError, match=r"rows.json, line 4, text: wrong type"):
        list(interchange.read(path))
    path.write_text('[{"text": "a"}, {"text": "b"')
    with pytest.raises(DataError, match="is not JSON"):
        list(interchange.read(path))
    path.write_text('[{"text": "a"},')
    with pytest.raises(DataError, match="truncated"):
        list(interchange.read(path))
    path.write_text('[{"text": "a"} {"text": "b"}]')
    with pytest.raises(DataError, match="after its record 1"):
        list(interchange.read(path))


def test_any_text_as_a_file_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | texts_of_keys,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=8,
    )

    @settings(quick, max_examples=50)
    @given(st.lists(st.dictionaries(keys, value, min_size=1, max_size=6), min_size=1, max_size=3))
    def check(rows: list[dict[str, Any]]) -> None:
        wrote(path, rows)
        for name in (None, *(row.name for row in FORMATS)):
            try:
                list(interchange.read(path, name=name))
            except DataError as error:
                assert "\n" not in str(error)  # noqa: PT017

    check()


@pytest.mark.parametrize(
    ("name", "row", "mark"),
    [
        ("labels", {"prompt": "a?", "completions": ["b", "c"], "ranks": [1, 2]}, "ranks"),
        ("verl", {"data_source": "s", "prompt": [{"role": "user", "content": "a?"}], "ability": "x",
                  "reward_model": {"style": "rule", "ground_truth": "7"}, "extra_info": {}}, "reward_model"),
    ],
)  # fmt: skip
def test_one_row_without_its_marks_does_not_make_another_format_of_the_file(
    name: str, row: dict[str, Any], mark: str, tmp_path: Path
) -> None:
    rows = [dict(row) for _ in range(5)]
    del rows[3][mark]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    with pytest.raises(DataError, match=rf"line 4.*missing key: '{mark}'"):
        list(interchange.read(path))
    bad = Drops()
    assert len(list(interchange.read(path, Intake("x", bad)))) == 4
    assert bad.counts == {"missing key": 1}


KEYS = """messages text prompt completion chosen rejected label completions labels ranks role content tool_calls
function name arguments instruction input output history conversations from value info summaries choice summary axes
post reward_model data_source winner model_a model_b conversation_a conversation_b message_id parent_id instances
replies rank type rating kind confidence probability tools preferred_output non_preferred_output"""
keys = st.sampled_from(KEYS.split())
texts_of_keys = st.sampled_from(["user", "assistant", "gpt", "human", "hi", "", "\n\nHuman: a\n\nAssistant: b", "pair"])


# Real files.


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not on this machine")
def test_published_pairs_and_seed_tasks_are_recognised_and_read() -> None:
    bad = Drops()
    found = list(interchange.read(SHARED / "hh-rlhf-harmless-pairs.jsonl.gz", Intake("hh", bad)))
    assert len(found) + bad.counts.total() == 1800
    assert len(found) > 1780
    assert all(isinstance(pair, PairExample) for pair in found)
    assert set(bad.counts) <= {"empty text", "no common prompt", "wrong role"}
    assert len(list(interchange.read(SHARED / "self-instruct-seed-tasks.jsonl"))) == 175


def test_messages_parts_without_text_are_spelled_out() -> None:
    assert (
        Message("assistant", (CallPart("f", "{}"),)).text == '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    )
