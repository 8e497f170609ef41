"""LLaMA-Factory's dataset_info.json: what the data files of a folder are called, how they are laid out, and what their
columns mean. The data themselves are read by alpaca.py, sharegpt.py and trl.py.

Only data sets in files beside the description are read; one that lives on a hub is refused by name, as are images,
videos and sounds. Source: the data README of LLaMA-Factory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from fledge.data import alpaca, sharegpt, trl
from fledge.data.feedback import FeedbackExample
from fledge.data.reading import text_blocks
from fledge.data.records import Intake, Row, rows
from fledge.errors import DataError
from fledge.files import write_json
from fledge.types import PairExample, UnpairedExample

NAME = "dataset_info.json"
_KEYS = {"file_name", "formatting", "ranking", "columns", "tags", "split", "num_samples"}
_OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
NamesT = TypeVar("NamesT", alpaca.Columns, sharegpt.Tags)


def names(path: Path) -> list[str]:
    """The data sets that a description names."""
    return list(_description(path))


def read(path: Path, intake: Intake, chosen: Sequence[str] | None = None) -> Iterator[FeedbackExample]:
    """The examples of the data sets `chosen` (all of them, in order, without it); each is its own source.

    `num_samples` takes the first so many rows. `DataError` for a data set that is not there, lives on a hub, or whose
    description says something that is not understood.
    """
    described = _description(path)
    for name in described if chosen is None else chosen:
        if name not in described:
            raise DataError(f"{path} describes no data set '{name}': it has {', '.join(described)}")
        entry = described[name]
        if not isinstance(entry, dict):
            raise DataError(f"{path}, {name}: expected an object; mend the description")
        yield from _examples(path, name, entry, replace(intake, source=f"{intake.source}/{name}"))


def write(folder: Path, name: str, examples: Iterable[FeedbackExample]) -> None:
    """Add a data set in the ShareGPT layout to a folder: NAME.json, and its entry in dataset_info.json.

    Conversations, pairs and labelled answers must not be mixed in one data set: `DataError`.
    """
    held = list(examples)
    if len({type(example) for example in held}) != 1:
        raise DataError(f"the data set '{name}' needs examples of one type, got {len({type(e) for e in held})}")
    records = list(sharegpt.write(held))
    columns = {"messages": "conversations", "system": "system", "tools": "tools"}
    if isinstance(held[0], PairExample):
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    if isinstance(held[0], UnpairedExample):
        columns |= {"kto_tag": "kto_tag"}
    entry: dict[str, Any] = {"file_name": f"{name}.json", "formatting": "sharegpt", "columns": columns}
    if isinstance(held[0], PairExample):
        entry["ranking"] = True
    place = folder / NAME
    described = _description(place) if place.exists() else {}
    write_json(folder / f"{name}.json", records)
    write_json(place, {**described, name: entry})


def _description(path: Path) -> dict[str, Any]:
    try:
        described = json.loads("".join(text_blocks(path)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): expected an object of data sets; mend it") from error
    if not isinstance(described, dict):
        raise DataError(f"{path} is no {NAME}: expected an object of data sets by name")
    return described


def _examples(path: Path, name: str, entry: dict[str, Any], intake: Intake) -> Iterator[FeedbackExample]:
    where = f"{path}, {name}"
    if "file_name" not in entry:
        raise DataError(f"{where}: it names no file; fetch its files, then name one with file_name")
    if unknown := set(entry) - _KEYS:
        raise DataError(
            f"{where}: {', '.join(sorted(unknown))} is not understood: known are {', '.join(sorted(_KEYS))}"
        )
    file = path.parent / str(entry["file_name"])
    found = rows(file, intake)
    if entry.get("num_samples") is not None:
        found = islice(found, int(entry["num_samples"]))
    layout = entry.get("formatting", "alpaca")
    columns, tags = dict(entry.get("columns") or {}), dict(entry.get("tags") or {})
    if layout == "alpaca":
        if set(columns) == {"prompt"}:  # what the README calls a pre-training data set: one column of text
            return trl.read(_renamed(found, {columns["prompt"]: "text"}), intake)
        return alpaca.read(_without_unnamed(found, columns), intake, _named(alpaca.DEFAULT, columns, where))
    if layout == "sharegpt":
        return sharegpt.read(found, intake, _named(sharegpt.DEFAULT, columns | tags, where))
    if layout == "openai":
        return sharegpt.read(found, intake, _named(sharegpt.DEFAULT, _OPENAI_TAGS | columns | tags, where))
    raise DataError(f"{where}: formatting is '{layout}', expected alpaca, sharegpt or openai")


def _named(default: NamesT, given: Mapping[str, str], where: str) -> NamesT:
    known = {field.name for field in fields(default)}
    if unknown := set(given) - known:
        raise DataError(f"{where}: column {', '.join(sorted(unknown))} is not understood: known are {sorted(known)}")
    return replace(default, **given)


def _without_unnamed(found: Iterable[Row], columns: Mapping[str, str]) -> Iterator[Row]:
    """Rows without the columns that a description leaves out: there, a column that is not named is not used."""
    unused = set(asdict(alpaca.DEFAULT).values()) - set(columns.values()) if columns else set()
    for row in found:
        yield replace(row, record={key: value for key, value in row.record.items() if key not in unused})


def _renamed(found: Iterable[Row], names_: Mapping[str, str]) -> Iterator[Row]:
    for row in found:
        yield replace(row, record={new: row.record.get(old) for old, new in names_.items()})
