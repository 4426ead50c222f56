"""Writes the rows of one trial so that readers see all of them or none, whatever ends the process."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysweep.errors import NumericalError, RaysweepError
from raysweep.fingerprint import is_identity
from raysweep.results.atomic import write_atomically
from raysweep.results.folders import TRIALS, UNITS
from raysweep.results.schema import SCHEMA_VERSION, STATUSES, UNIT_KINDS, trial_schema, unit_schema

ROW_KEY = b"raysweep.row"
"""Key of the file's own metadata under which a trial's row is kept as JSON too. Decoding the columns of 5,000
files of one row took 6 to 9 s (1.2 ms a file, most of it per column, 2 cores), reading this key 2 s."""

# With a row or a few, dictionaries, statistics and a second copy of the schema only cost space and time.
_PLAIN: dict[str, Any] = {
    "compression": "NONE",
    "use_dictionary": False,
    "write_statistics": False,
    "store_schema": False,
}


def write_rows(
    folder: Path,
    trial_row: Mapping[str, Any],
    unit_rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    tasks: Sequence[str] = (),
) -> Path:
    """Writes the row of a trial and those of its units; returns the file of the trial.

    folder: of the sweep; `trials/` and `units/` are made in it
    trial_row: columns of `trials`; missing ones are null, unknown ones are refused
    unit_rows: columns of `units`; `trial_id` is filled in
    names: of the evaluation entries, for the columns `perplexity_<name>`;  tasks: for the columns `task_<name>`

    The units are written first, so a visible trial is complete. Rows of the same trial are replaced.
    Raises NumericalError for a number that is not finite, RaysweepError for rows that do not fit the schema.
    """
    row = {"schema_version": SCHEMA_VERSION, **trial_row}
    identity = _checked_identity(row)
    units = _table([_with_identity(unit, identity) for unit in unit_rows], unit_schema(), "units")
    trial = _table([row], trial_schema(names, tasks), "trials")
    _replace(folder / UNITS / f"{identity}.parquet", units)
    return _replace_trial(folder, row, trial)


def write_trial_row(folder: Path, row: Mapping[str, Any], names: Sequence[str], tasks: Sequence[str]) -> Path:
    """Replaces the row of a trial, all its columns, and leaves its units as they are. Otherwise as `write_rows`."""
    _checked_identity(row)
    return _replace_trial(folder, row, _table([row], trial_schema(names, tasks), "trials"))


def _replace_trial(folder: Path, row: Mapping[str, Any], table: pa.Table) -> Path:
    path = folder / TRIALS / f"{row['trial_id']}.parquet"
    _replace(path, table, {ROW_KEY: encode_row(row)})
    return path


def encode_row(row: Mapping[str, Any]) -> bytes:
    """A row as JSON; moments as ISO text, nulls left out."""
    plain = {k: v.isoformat() if isinstance(v, datetime) else v for k, v in row.items() if v is not None}
    return json.dumps(plain, allow_nan=False).encode()


def write_table(
    path: Path, table: pa.Table, metadata: Mapping[bytes, bytes] | None = None, **options: Any
) -> None:
    """Replaces a Parquet file as `write_atomically` does. options: of pyarrow's writer. Raises StorageError."""
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, table.schema, **options) as file:
        file.write_table(table)
        file.add_key_value_metadata(dict(metadata or {}))
    write_atomically(path, memoryview(buffer.getvalue()))


def _replace(path: Path, table: pa.Table, metadata: Mapping[bytes, bytes] | None = None) -> None:
    write_table(path, table, metadata, **_PLAIN)


def _checked_identity(row: Mapping[str, Any]) -> str:
    for name in ("trial_id", "recovery_id"):
        if not is_identity(row.get(name)):
            raise RaysweepError(f"{name} of a row is {row.get(name)!r}, not 16 hexadecimal digits")
    if row.get("status") not in STATUSES:
        raise RaysweepError(f"status of a row is {row.get('status')!r}, not one of {', '.join(STATUSES)}")
    return str(row["trial_id"])


def _with_identity(unit: Mapping[str, Any], identity: str) -> dict[str, Any]:
    if unit.get("trial_id", identity) != identity:
        raise RaysweepError(f"a unit of trial {unit['trial_id']} among those of trial {identity}")
    if unit.get("kind") not in UNIT_KINDS:
        raise RaysweepError(f"kind of a unit is {unit.get('kind')!r}, not one of {', '.join(UNIT_KINDS)}")
    return {**unit, "trial_id": identity}


def _table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema, what: str) -> pa.Table:
    known = set(schema.names)
    for row in rows:
        unknown = sorted(set(row) - known)
        if unknown:
            raise RaysweepError(f"unknown columns of {what}: {', '.join(unknown)}")
        for name, value in row.items():
            _check_value(name, value, schema.field(name).type)
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)


def _check_value(name: str, value: Any, kind: pa.DataType) -> None:
    """Exact types, because Arrow would turn some values into others silently."""
    if value is None:
        return
    expected: dict[pa.DataType, type | tuple[type, ...]] = {
        pa.string(): str,
        pa.bool_(): bool,
        pa.int64(): int,
        pa.float64(): (float, int),
    }
    fits = isinstance(value, expected.get(kind, datetime))
    if not fits or (isinstance(value, bool) and kind != pa.bool_()):
        raise RaysweepError(f"column {name} takes {kind}, but got {value!r} of type {type(value).__name__}")
    if isinstance(value, datetime) and value.tzinfo is None:
        raise RaysweepError(f"column {name} got a moment without a time zone: {value}")
    if isinstance(value, float) and not math.isfinite(value):
        raise NumericalError(f"{name} is {value}: not a result")


def now() -> datetime:
    """This moment, in UTC, as the columns want it."""
    return datetime.now(UTC)
