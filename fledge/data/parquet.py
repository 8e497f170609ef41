"""Parquet files: a column "text", "messages", or "prompt" and "completion", read batch by batch (pyarrow)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fledge.data.jsonl import USER_LICENCE, record_example
from fledge.data.reading import Example, open_binary
from fledge.errors import DataError

COLUMNS = ("text", "messages", "prompt", "completion")
BATCH_ROWS = 1024


def file_examples(path: Path, source: str) -> Iterator[Example]:
    """The examples of a Parquet file; `DataError` if it is not one, lacks the columns, or holds a wrong type."""
    with open_binary(path) as file:
        try:
            table = pq.ParquetFile(file)
            names = table.schema_arrow.names
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path} is not a Parquet file ({_line(error)}): export it again or leave it out"
            ) from error
        columns = [name for name in COLUMNS if name in names]
        if not {"text", "messages"} & set(columns) and not {"prompt", "completion"} <= set(columns):
            raise DataError(
                f'{path} has the columns {", ".join(names)}: expected "text", "messages", or "prompt" and "completion"; '
                "rename the column that holds the text"
            )
        number = 0
        try:
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for record in batch.to_pylist():
                    where = f"{path}, row {number}"
                    yield record_example(record, source, f"{path.name}:{number}", USER_LICENCE, where=where)
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path} is damaged after row {number} ({_line(error)}): copy it again"
            ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
