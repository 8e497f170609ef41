"""Parquet files: a column "text", "messages", or "prompt" and "completion", read batch by batch (pyarrow)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fledge.data.jsonl import USER_LICENCE, record_example
from fledge.data.reading import Drops, Example, open_binary, shown
from fledge.errors import DataError

COLUMNS = ("text", "messages", "prompt", "completion")
BATCH_ROWS = 1024


def file_examples(path: Path, source: str, *, bad: Drops | None = None) -> Iterator[Example]:
    """The examples of a Parquet file; `DataError` if it is not one, lacks the columns, or is damaged.

    A row of a wrong type raises `DataError` naming it, or, given `bad`, is counted there.
    """
    for number, record in enumerate(table_records(path, lambda names: _columns(path, names))):
        where = f"{path}, row {number}"
        try:
            yield record_example(record, source, f"{shown(path.name)}:{number}", USER_LICENCE, where=where)
        except DataError:
            if bad is None:
                raise
            bad.add("not a usable record", where)


def table_records(path: Path, choose: Callable[[list[str]], list[str]] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, of the columns that `choose` picks from the file's (all without it); `DataError` if
    the file is damaged."""
    with open_binary(path) as file:
        try:
            table = pq.ParquetFile(file)
            columns = choose(table.schema_arrow.names) if choose else None
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{path} is not a sound Parquet file ({reason}): export it again or leave it out"
            ) from error


def _columns(path: Path, names: list[str]) -> list[str]:
    """The columns to read; "messages" is None in rows of plain text and the other way round, so both may stand."""
    present = [name for name in COLUMNS if name in names]
    if not {"text", "messages"} & set(present) and not {"prompt", "completion"} <= set(present):
        raise DataError(
            f'{path} has the columns {", ".join(names)}: expected "text", "messages", or "prompt" and '
            '"completion"; rename the column that holds the text'
        )
    return present
