"""Alignment data in every format: which there are, recognising one, reading, and writing.

The rows of `FORMATS` are tried in order, so the narrower comes before the wider. What is written is read back and
compared before it counts as written: a format that cannot hold an example refuses it and never alters it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq

from fledge.data import llama_factory
from fledge.data.feedback import FeedbackExample, cannot_write
from fledge.data.records import LINE_SUFFIXES, BadRow, Intake, Row, rows
from fledge.errors import DataError, nearest
from fledge.files import write_file
from fledge.types import Provenance

NUM_RECOGNISED = 20  # rows that are looked at to recognise a format


class _Module(Protocol):
    def recognises(self, record: Mapping[str, Any]) -> bool: ...
    def read(self, rows: Iterable[Row], intake: Intake) -> Iterator[FeedbackExample]: ...
    def write(self, examples: Iterable[FeedbackExample]) -> Iterator[dict[str, Any]]: ...


@dataclass(frozen=True)
class Format:
    """`keeps_origin`: whether rows carry source, id and licence."""

    name: str
    what: str
    module: str
    keeps_origin: bool = False

    def load(self) -> _Module:
        return cast(_Module, importlib.import_module(f"fledge.data.{self.module}"))


FORMATS = (
    Format("labels", "rankings, pairs, verdicts and ratings of humans, models and rules", "labels", True),
    Format("arena", "battles of two models", "arena"),
    Format("oasst", "OpenAssistant's message trees", "oasst"),
    Format("summaries", "summarize-from-feedback: comparisons and ratings", "summaries"),
    Format("self-instruct", "instructions with instances", "self_instruct"),
    Format("openai", "OpenAI's fine-tuning files: chats and preferences", "openai_tuning"),
    Format("verl", "prompts with ground truth", "verl"),
    Format("sharegpt", "conversations of human and gpt", "sharegpt"),
    Format("alpaca", "instruction, input, output", "alpaca"),
    Format("hh-rlhf", "two dialogues as text", "hh_rlhf"),
    Format("ds-chat", "prompt as text, chosen, rejected", "ds_chat"),
    Format("trl", "messages, text, prompt, completion, chosen, rejected, label", "trl", True),
)


def format_named(name: str) -> Format:
    """The row of that name; `DataError` with the nearest name if there is none."""
    for row in FORMATS:
        if row.name == name:
            return row
    raise DataError(f"unknown format '{name}': {nearest(name, [row.name for row in FORMATS])}")


def read(path: Path, intake: Intake | None = None, *, name: str | None = None) -> Iterator[FeedbackExample]:
    """The examples of a file (or of every data set of a dataset_info.json), in the format `name` or a recognised one.

    Raises `DataError` for a file that holds nothing or that no format knows, and for bad rows as `Intake` says.
    """
    intake = intake or Intake()
    if path.is_dir() and (path / llama_factory.NAME).is_file():
        path = path / llama_factory.NAME
    if path.name == llama_factory.NAME:
        yield from llama_factory.read(path, intake)
        return
    found = rows(path, intake)
    head = list(islice(found, NUM_RECOGNISED))
    if not head:
        raise DataError(f"{path} holds no usable row: expected one of {', '.join(row.name for row in FORMATS)}")
    chosen = format_named(name) if name else recognised(head)
    yield from chosen.load().read(chain(head, found), intake)


def recognised(head: Sequence[Row]) -> Format:
    """The first format that knows one of the rows; a format that knows more of them comes before one that knows fewer.

    The last one, TRL's, has keys that are everybody's (`prompt`, `text`): of a row that another knows it has no say, so
    that one row without its marks does not make another format of the whole file. `DataError` naming the keys of the
    first row if none knows any.
    """
    knowing = [{row.name for row in FORMATS if row.load().recognises(each.record)} for each in head]
    counts = [sum(row.name in (names - {FORMATS[-1].name} or names) for names in knowing) for row in FORMATS]
    if not any(counts):
        keys = ", ".join(head[0].record) or "none"
        known = ", ".join(row.name for row in FORMATS)
        raise DataError(f"{head[0].where}: no format has the keys {keys}; name one of {known}, or rename the keys")
    return FORMATS[counts.index(max(counts))]


def write(path: Path, examples: Iterable[FeedbackExample], *, name: str = "trl") -> int:
    """Write examples to a .jsonl, .json or .parquet file, whole or not at all; how many.

    Raises `DataError` for an example that the format cannot hold as it is.
    """
    chosen = format_named(name)
    records = (record for example in examples for record in records_of(example, chosen))
    if path.suffix == ".parquet":
        return _write_parquet(path, list(records))
    if path.name.endswith(tuple(s for s in LINE_SUFFIXES if not s.endswith(".gz"))):
        return _write_lines(path, records)
    if path.suffix == ".json":
        held = list(records)
        write_file(path, lambda place: place.write_text(_json(held) + "\n", encoding="utf-8"))
        return len(held)
    raise DataError(f"{path} is of no kind that is written: expected .jsonl, .json or .parquet")


def records_of(example: FeedbackExample, chosen: Format) -> list[dict[str, Any]]:
    """The records of one example, read back and compared; all but its origin, where the format has no place for it."""
    module = chosen.load()
    records = list(module.write([example]))
    intake = Intake(max_chars=1 << 62)
    read_rows = [
        Row(f"record {n}", str(n), json.loads(_json(record)), intake.max_chars) for n, record in enumerate(records)
    ]
    try:
        back = list(module.read(read_rows, intake))
    except BadRow as fault:
        raise cannot_write(example, chosen.name, f"it would be refused there ({fault.reason})") from fault
    if not chosen.keeps_origin:
        example, back = _anonymous(example), [_anonymous(each) for each in back]
    if example not in back:
        raise cannot_write(example, chosen.name, "it would be read back as something else")
    return records


def _anonymous(example: FeedbackExample) -> FeedbackExample:
    return replace(example, provenance=Provenance("", "", ""))


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> int:
    count = 0

    def fill(place: Path) -> None:
        nonlocal count
        with place.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(_json(record) + "\n")
                count += 1

    write_file(path, fill)
    return count


def _write_parquet(path: Path, records: list[dict[str, Any]]) -> int:
    try:
        table = pa.Table.from_pylist([_columnar(record) for record in records])
        write_file(path, lambda place: pq.write_table(table, place))
    except (pa.ArrowException, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: these rows do not fit into columns ({reason}); write .jsonl instead") from error
    return len(records)


def _columnar(value: Any, key: str = "") -> Any:
    """What no Parquet type fits, because every row's differs, as JSON text: tools and the arguments of calls."""
    if key == "tools" or (key == "function.arguments" and not isinstance(value, str)):
        return _json(value)
    if isinstance(value, dict):
        within = "function." if key == "function" else ""
        return {name: _columnar(each, within + name) for name, each in value.items()}
    return [_columnar(each) for each in value] if isinstance(value, list) else value


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise DataError(f"a value cannot be written as JSON ({error}): expected texts and finite numbers") from error
