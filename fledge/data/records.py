"""Rows of any file of records, and what may be asked of a row; bottom of the alignment formats.

A file is JSON lines, one JSON array, or Parquet; the first two may be packed with gzip. A row that cannot be used is a
`BadRow`, which names file, line and reason: it is raised, or counted where the caller hands in a `Drops`. Nothing is
skipped without one or the other.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fledge.data.jsonl import USER_LICENCE
from fledge.data.parquet import table_records
from fledge.data.reading import Drops, lines, text_blocks
from fledge.errors import DataError
from fledge.types import Provenance

MAX_CHARS = 100_000  # of one text in a row: more than any context takes, and a mistake far more often than an answer
LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")
ExampleT = TypeVar("ExampleT")


class BadRow(DataError):
    """A row that cannot be used. `reason` is the same for all rows with its fault: it is what `Drops` counts."""

    def __init__(self, reason: str, where: str, detail: str) -> None:
        super().__init__(f"{where}: {reason}: {detail}")
        self.reason = reason
        self.where = where


@dataclass(frozen=True)
class Intake:
    """How rows are taken in: `bad` None refuses a bad row, a `Drops` counts it. `source` goes into the provenance of
    rows that do not name their own."""

    source: str = "user"
    bad: Drops | None = None
    max_chars: int = MAX_CHARS
    licence: str = USER_LICENCE

    def turn_away(self, fault: BadRow) -> None:
        """Raise the fault, or count it."""
        if self.bad is None:
            raise fault
        self.bad.add(fault.reason, fault.where)


@dataclass(frozen=True)
class Row:
    """A record, or an object inside one, with the place it stands at; asking for what is not there raises `BadRow`.

    A key with null counts as absent, as in Parquet, where every row has every key.
    """

    where: str
    identity: str
    record: Mapping[str, Any]
    max_chars: int = MAX_CHARS

    def has(self, *keys: str) -> bool:
        return all(self.record.get(key) is not None for key in keys)

    def value(self, key: str) -> Any:
        if self.record.get(key) is None:
            if key in self.record:
                raise BadRow("missing key", self.where, f"'{key}' is null; fill it in or drop the row")
            known = ", ".join(f"'{name}'" for name in self.record) or "none"
            raise BadRow("missing key", self.where, f"'{key}' is not among its keys ({known}); add it or drop the row")
        return self.record[key]

    def text(self, key: str, *, may_be_empty: bool = False) -> str:
        """A text with at least one visible character, unless it may be empty (then absent counts as empty)."""
        if may_be_empty and self.record.get(key) is None:
            return ""
        return self.checked(self.value(key), key, may_be_empty=may_be_empty)

    def optional_text(self, key: str) -> str | None:
        return self.text(key, may_be_empty=True) if self.has(key) else None

    def checked(self, value: Any, key: str, *, may_be_empty: bool = False) -> str:
        """`value` as the text it must be; `key` names it in the fault."""
        where = f"{self.where}, {key}"
        if not isinstance(value, str):
            raise BadRow("wrong type", where, f"expected a text, got {kind_of(value)}; mend or drop the row")
        if not value.strip() and not may_be_empty:
            raise BadRow("empty text", where, "expected at least one visible character; fill it in or drop the row")
        if len(value) > self.max_chars:
            limit = f"{len(value):,} characters, at most {self.max_chars:,} are taken"
            raise BadRow("text too long", where, f"{limit}; shorten it, raise the limit or drop the row")
        if found := _UNUSABLE.search(value):
            raise BadRow("undecodable text", where, f"U+{ord(found[0]):04X} at {found.start()}; mend or drop the row")
        return value

    def number(self, key: str) -> float:
        return self.number_of(self.value(key), key)

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def number_of(self, value: Any, key: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            where = f"{self.where}, {key}"
            raise BadRow("wrong type", where, f"expected a finite number, got {kind_of(value)}; mend or drop the row")
        return float(value)

    def flag(self, key: str) -> bool:
        return self.flag_of(self.value(key), key)

    def flag_of(self, value: Any, key: str) -> bool:
        """true, false, 1 or 0."""
        if value not in (True, False):
            where = f"{self.where}, {key}"
            raise BadRow("wrong type", where, f"expected true or false, got {kind_of(value)}; mend or drop the row")
        return bool(value)

    def items(self, key: str) -> list[Any]:
        value = self.value(key)
        if not isinstance(value, list | tuple):
            where = f"{self.where}, {key}"
            raise BadRow("wrong type", where, f"expected a list, got {kind_of(value)}; mend or drop the row")
        return list(value)

    def object(self, key: str) -> Row:
        return self.object_of(self.value(key), key)

    def objects(self, key: str) -> list[Row]:
        return [self.object_of(value, f"{key}[{place}]") for place, value in enumerate(self.items(key))]

    def object_of(self, value: Any, key: str) -> Row:
        where = f"{self.where}, {key}"
        if not isinstance(value, Mapping):
            raise BadRow("wrong type", where, f"expected an object, got {kind_of(value)}; mend or drop the row")
        return replace(self, where=where, record=value)

    def provenance(self, intake: Intake) -> Provenance:
        """What the row says of its origin under "source", "id" and "licence", and otherwise the file's."""
        told = {key: self.record.get(key) for key in ("source", "id", "licence")}
        given = {key: str(value) for key, value in told.items() if isinstance(value, str | int) and value != ""}
        return Provenance(
            given.get("source", intake.source), given.get("id", self.identity), given.get("licence", intake.licence)
        )


def kind_of(value: Any) -> str:
    """What a JSON value is, in words for a message: its kind, and itself where that is short."""
    said = json.dumps(value, ensure_ascii=True, default=str)
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "", type(None): ""}
    kind = next((name for each, name in kinds.items() if isinstance(value, each)), "the number")
    return f"{kind} {said if len(said) <= 40 else said[:37] + '...'}".strip()


def each(rows: Iterable[Row], intake: Intake, convert: Callable[[Row], Iterable[ExampleT]]) -> Iterator[ExampleT]:
    """What `convert` makes of every row; a row of which it refuses any part is turned away whole."""
    for row in rows:
        try:
            found = list(convert(row))
        except BadRow as fault:
            intake.turn_away(fault)
            continue
        yield from found


def rows(path: Path, intake: Intake) -> Iterator[Row]:
    """The rows of a file, one held at a time unless it is one JSON array.

    Raises `DataError` for a file that cannot be read or is of no known kind; `BadRow` as `Intake` says.
    """
    name = path.name.lower()
    if name.endswith(LINE_SUFFIXES):
        yield from _line_rows(path, intake)
    elif name.endswith((".json", ".json.gz")):
        yield from _array_rows(path, intake)
    elif name.endswith(".parquet"):
        for number, record in enumerate(table_records(path), 1):
            yield Row(f"{path}, row {number}", f"{path.name}:{number}", record, intake.max_chars)
    else:
        raise DataError(f"{path} is of no known kind: expected .jsonl, .json, .parquet, or the first two with .gz")


def _line_rows(path: Path, intake: Intake) -> Iterator[Row]:
    for number, line in lines(path):
        where = f"{path}, line {number}"
        try:
            yield _row(json.loads(line), where, f"{path.name}:{number}", intake)
        except (json.JSONDecodeError, RecursionError) as error:
            intake.turn_away(BadRow("not JSON", where, f"{error}; expected one object a line, mend or delete it"))
        except BadRow as fault:
            intake.turn_away(fault)


def _array_rows(path: Path, intake: Intake) -> Iterator[Row]:
    """The objects of one JSON array, each with the line it begins on; one object alone is an array of one."""
    text = "".join(text_blocks(path))
    decoder, blank = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    place = _after(blank, text, 0)
    is_array = text[place : place + 1] == "["
    place = _after(blank, text, place + is_array)
    line, counted, number = 1, 0, 0
    while place < len(text) and text[place] != "]":
        line, counted, number = line + text.count("\n", counted, place), place, number + 1
        where = f"{path}, line {line}"
        try:
            value, end = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where} is not JSON ({error}): expected a list of objects; export it again") from error
        try:
            yield _row(value, where, f"{path.name}:{number}", intake)
        except BadRow as fault:
            intake.turn_away(fault)
        place = _after(blank, text, end)
        if not is_array:
            break
        if text[place : place + 1] not in (",", "]"):
            raise DataError(f"{path} is not JSON after its record {number}: expected ',' or ']'; export it again")
        place = _after(blank, text, place + 1) if text[place] == "," else place
    if is_array and text[place : place + 1] != "]":
        raise DataError(f"{path} ends within its list of records; it is truncated, fetch or export it again")


def _after(blank: re.Pattern[str], text: str, place: int) -> int:
    found = blank.match(text, place)
    return found.end() if found else place


def _row(value: Any, where: str, identity: str, intake: Intake) -> Row:
    if not isinstance(value, dict):
        raise BadRow("not an object", where, f"expected an object of named values, got {kind_of(value)}; drop it")
    return Row(where, identity, value, intake.max_chars)
