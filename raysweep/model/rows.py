"""Ready-made samples: Parquet with a column `input_ids`, one token sequence per row, used in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raysweep.errors import UsageError
from raysweep.model.text import TextSource, open_parquet, reading, source_files

ROWS_COLUMN = "input_ids"


def has_rows(source: TextSource) -> bool:
    """Whether `source` is Parquet with a column `input_ids`, whose rows are the samples themselves."""
    if not source.is_file:
        return False
    first = source_files(source)[0]
    return first.suffix == ".parquet" and ROWS_COLUMN in open_parquet(first).schema_arrow.names


def count_rows(source: TextSource) -> int:
    """The number of ready-made samples of a source for which `has_rows` is true."""
    return sum(open_parquet(path).metadata.num_rows for path in source_files(source))


def read_rows(source: TextSource, start: int, stop: int, length: int) -> npt.NDArray[np.int64]:
    """Samples `start` to `stop` (excluded) of a source with `input_ids`, cut to their first `length` tokens.

    Returns int64, (stop - start) x length. Raises UsageError for a row that is shorter or holds nulls, with its number,
    and for a file that is damaged.
    """
    chunks = [chunk for path in source_files(source) for chunk in _rows_column(path).chunks]
    wanted = pa.chunked_array(chunks).slice(start, stop - start)
    rows = [_row(value, start + offset, length, source) for offset, value in enumerate(wanted)]
    return np.stack(rows) if rows else np.zeros((0, length), dtype=np.int64)


def _row(value: Any, number: int, length: int, source: TextSource) -> npt.NDArray[np.int64]:
    ids = value.as_py() or []
    if None in ids:
        raise UsageError(
            f"row {number} of {source.dataset} has a null among its tokens",
            remedy="leave the row out of the file",
        )
    if len(ids) < length:
        raise UsageError(
            f"row {number} of {source.dataset} has {len(ids)} tokens, and {length} were asked for",
            where="sequence_length",
            remedy="lower sequence_length or leave the row out of the file",
        )
    try:
        return np.asarray(ids[:length], dtype=np.int64)
    except OverflowError:
        raise UsageError(
            f"row {number} of {source.dataset} has the token {max(ids)}",
            allowed="ids of the model's tokenizer",
        ) from None


def _rows_column(path: Path) -> pa.ChunkedArray:
    with reading(path):
        file = open_parquet(path)
        if ROWS_COLUMN not in file.schema_arrow.names:
            raise UsageError(
                f"no column {ROWS_COLUMN!r} in {path}, as there is in other files of the data set",
                remedy="put files of token rows and files of text into folders of their own",
            )
        column = file.read(columns=[ROWS_COLUMN]).column(ROWS_COLUMN)
    if not hasattr(column.type, "value_type") or not pa.types.is_integer(column.type.value_type):
        raise UsageError(f"column {ROWS_COLUMN!r} of {path} is {column.type}", allowed="lists of integers")
    return column
