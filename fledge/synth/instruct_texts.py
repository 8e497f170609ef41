"""What Self-Instruct says to the model and how it reads the replies, in English and in Chinese.

Three prompts, after Wang et al. 2023 (2212.10560), appendix, tables 5 to 8: propose tasks; is a task classification;
give instances, input first or (for classification, so that all labels occur) label first. Worked examples in them come
from the seed tasks. Nothing here asks a model; these are functions of texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fledge.data.self_instruct import Instance, Task

Language = Literal["en", "zh"]


@dataclass(frozen=True)
class Wording:
    """The fixed phrases of one language."""

    propose: str
    task: str
    decide: str
    question: str
    yes: str
    no: str
    input_first: str
    output_first: str
    example: str
    input: str
    output: str
    label: str


ENGLISH = Wording(
    propose="Come up with a series of varied tasks:",
    task="Task",
    decide="Can the following task be regarded as a classification task with finite output labels?",
    question="Is it classification?",
    yes="Yes",
    no="No",
    input_first=(
        "Come up with examples for the following tasks. Try to give several examples where possible. "
        "If a task needs no input, give the output alone."
    ),
    output_first=(
        "Given a classification task, come up with an input for each of the possible class labels. "
        "If the task needs no input, give the class label alone."
    ),
    example="Example",
    input="Input",
    output="Output",
    label="Class label",
)
CHINESE = Wording(
    propose="请列出一系列各不相同的任务：",
    task="任务",
    decide="下面的任务能否看作输出标签有限的分类任务？",
    question="是分类任务吗？",
    yes="是",
    no="否",
    input_first="请为下面的任务举例。可以的话多举几个例子。如果任务不需要输入，直接给出输出。",
    output_first="下面是分类任务。请为每一个可能的类别标签写出一个输入。如果任务不需要输入，直接给出类别标签。",
    example="例",
    input="输入",
    output="输出",
    label="类别标签",
)
WORDINGS: dict[Language, Wording] = {"en": ENGLISH, "zh": CHINESE}
_COLON = "[:：]"


def propose_prompt(wording: Wording, instructions: Sequence[str]) -> str:
    """Numbered instructions, and the number of the next one left open."""
    numbered = [f"{wording.task} {n}: {_one_line(text)}" for n, text in enumerate(instructions, 1)]
    return "\n".join([wording.propose, "", *numbered, f"{wording.task} {len(instructions) + 1}:"])


def propose_stop(wording: Wording, number: int) -> tuple[str, ...]:
    """Where a list of proposals ends: an empty line, or this number."""
    return ("\n\n", f"\n{wording.task} {number}:")


def parse_proposals(wording: Wording, reply: str, *, is_cut: bool) -> tuple[list[str], int]:
    """(the instructions of a reply, how many were dropped because the reply was cut off before they ended)."""
    marks = rf"\n\s*{re.escape(wording.task)}\s*\d+\s*{_COLON}|\n\s*\d+\s*(?:[.)]\s|、)"
    parts = [_one_line(part) for part in re.split(marks, reply)]
    if is_cut and parts:
        return [part for part in parts[:-1] if part], 1
    return [part for part in parts if part], 0


def decide_prompt(wording: Wording, examples: Sequence[Task], instruction: str) -> str:
    """Decided examples, and the undecided instruction."""
    blocks = [
        _decision(wording, task.instruction, wording.yes if task.is_classification else wording.no) for task in examples
    ]
    return "\n\n".join([wording.decide, *blocks, _decision(wording, instruction, "")]).rstrip()


def parse_decision(wording: Wording, reply: str) -> bool | None:
    """Whether the reply says yes; None if it says neither."""
    said = reply.strip().casefold()
    if said.startswith(wording.yes.casefold()):
        return True
    if said.startswith((wording.no.casefold(), "不是")):
        return False
    return None


def instances_prompt(wording: Wording, examples: Sequence[Task], task: str, *, is_classification: bool) -> str:
    """Worked examples, and the task without its instances."""
    write = _labelled if is_classification else _worked
    head = wording.output_first if is_classification else wording.input_first
    blocks = [f"{wording.task}: {_one_line(t.instruction)}\n{write(wording, t.instances)}" for t in examples]
    return "\n\n".join([head, *blocks, f"{wording.task}: {_one_line(task)}\n"])


def parse_instances(
    wording: Wording, reply: str, *, is_classification: bool, is_cut: bool
) -> tuple[list[Instance], int]:
    """(the instances of a reply, how many of them were dropped as unreadable or cut off).

    Input first: blocks "Example n", each with an input before "Output:" (or an output alone). Label first: blocks that
    begin with "Class label:", the label on that line and the input below it.
    """
    parse = _parse_labelled if is_classification else _parse_worked
    found, num_lost = parse(wording, reply.strip())
    if is_cut and found:
        return found[:-1], num_lost + 1
    return found, num_lost


def _parse_worked(wording: Wording, reply: str) -> tuple[list[Instance], int]:
    marks = rf"(?:\A|\n)\s*{re.escape(wording.example)}\s*\d+\s*{_COLON}?[ \t]*\n?"
    blocks = [block for block in re.split(marks, reply) if block.strip()]
    found = []
    for block in blocks:
        parts = re.split(rf"(?:\A|\n)\s*{re.escape(wording.output)}\s*\d*\s*{_COLON}", block)
        if len(parts) == 2:
            given = re.sub(rf"\A\s*{re.escape(wording.input)}\s*{_COLON}", "", parts[0]).strip()
            found.append(Instance(_no_input(given), parts[1].strip()))
    return found, len(blocks) - len(found)


def _parse_labelled(wording: Wording, reply: str) -> tuple[list[Instance], int]:
    blocks = [part for part in re.split(rf"(?:\A|\n)\s*{re.escape(wording.label)}\s*{_COLON}", reply) if part.strip()]
    found = []
    for block in blocks:
        label, _, given = block.strip().partition("\n")
        given = re.sub(rf"\A\s*{re.escape(wording.input)}\s*{_COLON}", "", given).strip()
        found.append(Instance(_no_input(given), label.strip()))
    starts_with_label = re.match(rf"\s*{re.escape(wording.label)}\s*{_COLON}", reply)
    if not starts_with_label and found:
        return found[1:], 1  # what stands before the first label is none
    return found, 0


def _no_input(text: str) -> str:
    """Empty for the ways of saying that there is none."""
    return (
        "" if text.strip("<>()（）. 。").casefold() in ("no input", "noinput", "none", "n/a", "无", "无输入") else text
    )


def _decision(wording: Wording, instruction: str, answer: str) -> str:
    return f"{wording.task}: {_one_line(instruction)}\n{wording.question} {answer}"


def _worked(wording: Wording, instances: Sequence[Instance]) -> str:
    blocks = []
    for number, instance in enumerate(instances, 1):
        given = f"{wording.input}: {instance.input}\n" if instance.input else ""
        blocks.append(f"{wording.example} {number}\n{given}{wording.output}: {instance.output}")
    return "\n".join(blocks)


def _labelled(wording: Wording, instances: Sequence[Instance]) -> str:
    return "\n".join(f"{wording.label}: {each.output}\n{each.input}".rstrip() for each in instances)


def _one_line(text: str) -> str:
    return " ".join(text.split())
