"""Self-Instruct tasks: `{"id", "name", "instruction", "instances": [{"input", "output"}], "is_classification"}`.

The layout of the 175 seed tasks of Wang et al. 2023 (2212.10560) and of what synth/self_instruct.py writes. A task is
one instruction with several instances; as examples, each instance is a conversation of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.data.feedback import FeedbackExample, cannot_write
from fledge.data.records import BadRow, Intake, Row, each, rows
from fledge.errors import DataError
from fledge.types import ChatExample, Conversation, Provenance


@dataclass(frozen=True)
class Instance:
    """One case of a task; `input` is empty where the instruction alone says what to do."""

    input: str
    output: str


@dataclass(frozen=True)
class Task:
    """An instruction and its instances. The output of a classification task is one of a few labels."""

    id: str
    name: str
    instruction: str
    instances: tuple[Instance, ...]
    is_classification: bool
    provenance: Provenance

    def examples(self) -> list[ChatExample]:
        """A conversation an instance: instruction and input as the user's message, the output as the answer."""
        found = []
        for number, instance in enumerate(self.instances):
            said = f"{self.instruction}\n{instance.input}" if instance.input else self.instruction
            identity = self.id if len(self.instances) == 1 else f"{self.id}#{number}"
            origin = Provenance(self.provenance.source, identity, self.provenance.licence)
            found.append(ChatExample(Conversation.of(("user", said), ("assistant", instance.output)), origin))
        return found


def recognises(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("instruction"), str) and isinstance(record.get("instances"), list)


def read(rows: Iterable[Row], intake: Intake) -> Iterator[FeedbackExample]:
    """A conversation an instance."""
    yield from each(rows, intake, lambda row: read_task(row, intake).examples())


def write(examples: Iterable[FeedbackExample]) -> Iterator[dict[str, Any]]:
    """A task an example, not marked as classification; `DataError` for what is no single question and answer."""
    for example in examples:
        if not isinstance(example, ChatExample) or example.conversation.tools:
            raise cannot_write(example, "self-instruct")
        if [m.role for m in example.conversation.messages] != ["user", "assistant"]:
            raise cannot_write(example, "self-instruct", "a task is one question and one answer")
        said, answered = (message.text for message in example.conversation.messages)
        origin = example.provenance
        yield task_record(Task(origin.id, origin.id, said, (Instance("", answered),), False, origin))


def read_task(row: Row, intake: Intake) -> Task:
    """The task of a row; `BadRow` without an instruction, or without an instance that has an output."""
    instances = tuple(
        Instance(each.text("input", may_be_empty=True), each.text("output")) for each in row.objects("instances")
    )
    if not instances:
        raise BadRow("empty text", f"{row.where}, instances", "expected at least one instance; add it or drop the row")
    origin = row.provenance(intake)
    name = row.optional_text("name") or origin.id
    return Task(origin.id, name, row.text("instruction"), instances, row.flag("is_classification"), origin)


def read_tasks(path: Path, intake: Intake) -> list[Task]:
    """All tasks of a file; `DataError` if it holds none."""
    tasks = list(each(rows(path, intake), intake, lambda row: [read_task(row, intake)]))
    if not tasks:
        raise DataError(f"{path} holds no task: expected lines with instruction, instances and is_classification")
    return tasks


def task_record(task: Task) -> dict[str, Any]:
    """What `read_task` reads."""
    return {
        "id": task.id,
        "name": task.name,
        "instruction": task.instruction,
        "instances": [{"input": each.input, "output": each.output} for each in task.instances],
        "is_classification": task.is_classification,
    }
