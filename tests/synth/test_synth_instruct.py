"""The texts and filters of Self-Instruct: what is asked, how replies are read, what is dropped and why."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.data.self_instruct import Instance, Task
from fledge.synth import instruct_texts as texts
from fledge.synth.instruct_filters import reason_against, sound_instances
from fledge.synth.instruct_texts import CHINESE, ENGLISH
from fledge.types import Provenance

ORIGIN = Provenance("s", "1", "MIT")


def task(instruction: str, *instances: tuple[str, str], is_classification: bool = False) -> Task:
    cases = tuple(Instance(given, answer) for given, answer in instances)
    return Task("t", "t", instruction, cases, is_classification, ORIGIN)


def test_proposals_are_asked_for_by_numbered_tasks_and_read_back_to_the_cut() -> None:
    prompt = texts.propose_prompt(ENGLISH, ["Sort the\nnumbers.", "Write a poem."])
    assert prompt.endswith("Task 1: Sort the numbers.\nTask 2: Write a poem.\nTask 3:")
    reply = " Name three rivers.\nTask 4: Explain\nrain. \nTask 5: Cut of"
    assert texts.parse_proposals(ENGLISH, reply, is_cut=False) == (["Name three rivers.", "Explain rain.", "Cut of"], 0)
    assert texts.parse_proposals(ENGLISH, reply, is_cut=True) == (["Name three rivers.", "Explain rain."], 1)
    assert texts.parse_proposals(ENGLISH, "One.\n2. Two.\n3) Three.", is_cut=False)[0] == ["One.", "Two.", "Three."]
    found, _ = texts.parse_proposals(CHINESE, "写诗。\n任务 4：讲笑话。\n5、算数。", is_cut=False)
    assert found == ["写诗。", "讲笑话。", "算数。"]


def test_decisions_show_both_kinds_and_are_read_by_their_first_word() -> None:
    examples = [task("Good or bad?", ("x", "bad"), is_classification=True), task("Write.", ("", "ok"))]
    prompt = texts.decide_prompt(ENGLISH, examples, "Is it spam?")
    assert "Task: Good or bad?\nIs it classification? Yes\n\nTask: Write.\nIs it classification? No\n\n" in prompt
    assert prompt.endswith("Task: Is it spam?\nIs it classification?")
    assert texts.parse_decision(ENGLISH, " Yes.") is True
    assert texts.parse_decision(ENGLISH, "no") is False
    assert texts.parse_decision(ENGLISH, "Maybe") is None
    assert texts.parse_decision(CHINESE, "是的") is True
    assert texts.parse_decision(CHINESE, "不是") is False
    assert texts.parse_decision(CHINESE, "否") is False


@pytest.mark.parametrize("wording", [ENGLISH, CHINESE])
@pytest.mark.parametrize("is_classification", [False, True])
def test_worked_examples_are_written_as_replies_are_read(wording: texts.Wording, is_classification: bool) -> None:
    words = st.text(st.sampled_from("ab c天\n"), min_size=1, max_size=12).map(str.strip).filter(bool)
    labels = st.text(st.sampled_from("ab天"), min_size=1, max_size=5)
    outputs = labels if is_classification else words

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.tuples(st.just("") | words, outputs), min_size=1, max_size=4))
    def check(cases: list[tuple[str, str]]) -> None:
        shown = task("Do it.", *cases, is_classification=is_classification)
        prompt = texts.instances_prompt(wording, [shown], "Next.", is_classification=is_classification)
        _, _, rest = prompt.partition("Do it.\n")
        reply, _, _ = rest.rpartition(f"\n\n{wording.task}:")
        found, lost = texts.parse_instances(wording, reply, is_classification=is_classification, is_cut=False)
        assert found == list(shown.instances)
        assert lost == 0

    check()


def test_a_reply_that_was_cut_loses_its_last_instance_and_strange_blocks_are_counted() -> None:
    reply = "Example 1\nInput: 1 2\nOutput: 3\nExample 2\nno output here\nExample 3\nInput: 4\nOutput: fo"
    found, lost = texts.parse_instances(ENGLISH, reply, is_classification=False, is_cut=True)
    assert (found, lost) == ([Instance("1 2", "3")], 2)
    found, _ = texts.parse_instances(ENGLISH, "Output: alone", is_classification=False, is_cut=False)
    assert found == [Instance("", "alone")]
    found, lost = texts.parse_instances(ENGLISH, "junk\nClass label: bad\nawful", is_classification=True, is_cut=False)
    assert (found, lost) == ([Instance("awful", "bad")], 1)
    reply = "Example 1\nInput: <noinput>\nOutput: yes"
    assert texts.parse_instances(ENGLISH, reply, is_classification=False, is_cut=False)[0] == [Instance("", "yes")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Name three rivers of Europe.", None),
        ("Do this now", "too short"),
        ("word " * 151, "too long"),
        ("Describe the picture in one sentence.", "needs more than text"),
        ("Go to the shop and buy bread.", "needs more than text"),
        ("Describe what a cartographer does all day.", None),
        ("Write a program that sorts numbers.", "asks for a program"),
        ("“Quote” a famous person you like.", "begins with punctuation"),
        ("Écris une lettre à ton ami.", "not in the language"),
    ],
)
def test_english_instructions_are_dropped_for_the_papers_reasons(text: str, reason: str | None) -> None:
    assert reason_against(text, "en") == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("写一首关于春天的诗。", None),
        ("写诗吧", "too short"),
        ("长" * 226, "too long"),
        ("描述这张图片的内容。", "needs more than text"),
        ("编写一个程序来排序。", "asks for a program"),
        ("。从标点开始的任务", "begins with punctuation"),
        ("Write a poem about spring.", "not in the language"),
    ],
)
def test_chinese_instructions_are_dropped_for_the_same_reasons(text: str, reason: str | None) -> None:
    assert reason_against(text, "zh") == reason


def test_instances_are_dropped_for_the_papers_reasons_and_counted() -> None:
    some = [
        Instance("a", "1"),
        Instance("a", "1"),
        Instance("b", "2"),
        Instance("b", "3"),
        Instance("c", " "),
        Instance("d", "d "),
        Instance("e", "as follows:"),
        Instance("f:", "6"),
        Instance("g", "7"),
        Instance("h", "8"),
    ]
    kept, dropped = sound_instances(some, at_most=2)
    assert kept == [Instance("a", "1"), Instance("g", "7")]
    assert dropped == {
        "repeated": 1,
        "one input, several outputs": 2,
        "empty output": 1,
        "output repeats the input": 1,
        "ends in a colon": 2,
        "more than asked for": 1,
    }
