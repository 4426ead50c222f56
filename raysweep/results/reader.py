"""Reads sweeps, into pandas or as plain rows: any columns that files have, past whatever else lies in the folder."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from raysweep.errors import RaysweepError, UsageError
from raysweep.results.folders import TRIALS, UNITS, compacted_file, row_files, sweep_folder
from raysweep.results.schema import (
    MOMENT,
    OPEN_PREFIXES,
    PERPLEXITY_PREFIX,
    REAL,
    STATUSES,
    TASK_PREFIX,
    TEXT,
    TRIAL_COLUMNS,
    TRUTH,
    WHOLE,
    trial_schema,
    unit_schema,
)
from raysweep.results.writer import ROW_KEY

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST = datetime.max.replace(tzinfo=UTC)  # rows of other programs may not say when they started
_THREADS = 4  # opening Parquet files releases the interpreter for part of the time; more gained nothing

_TYPES = {column.name: column.type for column in TRIAL_COLUMNS}
_EXACT: dict[pa.DataType, tuple[type, ...]] = {
    TEXT: (str,),
    REAL: (float, int),
    WHOLE: (int,),
    TRUTH: (bool,),
    MOMENT: (datetime,),
}

logger = logging.getLogger(__name__)


def load_results(path_or_name: str | Path, storage: str | Path | None = None) -> pd.DataFrame:
    """The trials of a sweep, one row each, in the order in which they started.

    path_or_name: a sweep's name in the storage, or the path or URI of its folder
    storage: a folder or URI, else RAYSWEEP_STORAGE, else ./raysweep-results
    Columns: docs/results.md. Whole numbers and truth values are pandas' nullable types, the rest is plain.
    Raises UsageError when there is no such sweep or it has no trial yet.
    """
    folder = sweep_folder(path_or_name, storage)
    own = own_rows(folder)
    table = united([row_table(list(own.values())), read_compacted(folder, TRIALS, own)])
    if not table.num_rows:
        raise _nothing_yet(folder)
    frame = _to_pandas(table)
    return frame.sort_values(["started_at", "trial_id"], kind="stable", ignore_index=True)


def load_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of `load_results` as dictionaries: every column of any in each, None where one does not apply.

    For who prints them: to import pandas would take longer than all the rest.
    """
    rows = list(trial_rows(folder).values())
    if not rows:
        raise _nothing_yet(folder)
    columns = _union_schema(rows).names
    whole = ({name: row.get(name) for name in columns} for row in rows)
    return sorted(whole, key=lambda row: (row["started_at"] or _LAST, row["trial_id"]))


def frame_of(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows of `load_rows` as `load_results` gives them."""
    return _to_pandas(row_table(rows))


def load_units(path_or_name: str | Path, storage: str | Path | None = None) -> pd.DataFrame:
    """The units of every trial of a sweep, trial by trial as in `load_results`, in their own order."""
    import pyarrow.compute as pc

    folder = sweep_folder(path_or_name, storage)
    identities = pa.array(load_results(folder)["trial_id"], pa.string())
    mine = set(identities.to_pylist())
    files = [path for path in row_files(folder, UNITS) if path.stem in mine]
    own = {path.stem: table for path, table in in_threads(read_table, files) if table is not None}
    tables = [unit_schema().empty_table(), *own.values(), read_compacted(folder, UNITS, own)]
    table = pa.concat_tables(tables, promote_options="permissive")
    place = pc.index_in(table["trial_id"], identities)  # null where there is no such trial
    order = pa.table({"place": place, "row": pa.array(range(table.num_rows), pa.int64())}).filter(
        pc.is_valid(place)
    )
    return _to_pandas(table.take(order.take(pc.sort_indices(order["place"]))["row"]))


def trial_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Every row in a sweep's folder by trial_id, without what is null; empty when there is none."""
    own = own_rows(folder)
    compacted = _without_nulls(read_compacted(folder, TRIALS, own))
    return own | {row["trial_id"]: row for row in compacted}


def trial_states(folder: Path) -> dict[str, str]:
    """trial_id to status of every row in a sweep's folder; empty when there is none."""
    own = own_rows(folder)
    compacted = read_compacted(folder, TRIALS, own, ["trial_id", "status"])
    pairs = zip(compacted["trial_id"].to_pylist(), compacted["status"].to_pylist(), strict=True)
    return {identity: row["status"] for identity, row in own.items()} | dict(pairs)


def trial_ids(folder: Path) -> list[str]:
    """The trials of a sweep that have a row, as the names of their files say: fast."""
    own = [path.stem for path in row_files(folder, TRIALS)]
    return [*own, *read_compacted(folder, TRIALS, own, ["trial_id"])["trial_id"].to_pylist()]


def row_count(folder: Path) -> int:
    """How many trials of a sweep have a row, as the names of their files say: fast."""
    return len(trial_ids(folder))


def own_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """By trial_id the rows that lie in files of their own, without what is null."""
    rows = [row for _, row in in_threads(_read_row, row_files(folder, TRIALS)) if row is not None]
    return {row["trial_id"]: row for row in rows}


def read_compacted(
    folder: Path, part: str, own: Collection[str], columns: Sequence[str] | None = None
) -> pa.Table:
    """What `raysweep clean` has put together in `trials` or `units`, all or some columns of it.

    own: identities of trials with files of their own, which count instead. Those must have been read before, because
    `clean` removes them once they are in here
    Raises RaysweepError where the file cannot be read: passing it over would run all its trials again.
    """
    path = compacted_file(folder, part)
    if not path.exists():
        schema = trial_schema() if part == TRIALS else unit_schema()
        nothing = pa.Table.from_batches([], schema)  # `schema.empty_table()` would import pandas
        return nothing if columns is None else nothing.select(columns)
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns)
        if set(own).isdisjoint(table["trial_id"].to_pylist()):
            return table
        import pyarrow.compute as pc  # as seldom as rows are written again: it takes longer than to read them

        return table.filter(pc.invert(pc.is_in(table["trial_id"], pa.array(sorted(own), pa.string()))))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise RaysweepError(
            f"{path} holds the rows of many trials and cannot be read: {error}.\n  Bring it back from a copy; "
            "without the file, the next launch runs its trials again."
        ) from error


def row_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows as a table: our columns with every `perplexity_<name>` and `task_<name>` of any row, then columns of other
    versions."""
    return pa.Table.from_pylist(list(rows), schema=_union_schema(rows))


def united(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables of trials as one: the columns of all, in our order."""
    table = pa.concat_tables(tables, promote_options="permissive")
    return table.select(list(dict.fromkeys([*_known_schema(table.column_names).names, *table.column_names])))


def in_threads(read: Callable[[Path], T], files: Iterable[Path]) -> list[tuple[Path, T]]:
    """Every file with what `read` makes of it."""
    paths = list(files)
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(zip(paths, threads.map(read, paths), strict=True))


def _read_row(path: Path) -> dict[str, Any] | None:
    """A trial's row, from the file's metadata or, when another program wrote it, from its columns."""
    try:
        with pq.ParquetFile(path) as file:
            stored = (file.metadata.metadata or {}).get(ROW_KEY)
            rows = [_decode_row(stored)] if stored else _without_nulls(file.read())
    except FileNotFoundError:  # compacted since
        return None
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        logger.warning("passed over %s: %s", path, error)
        return None
    if len(rows) != 1 or rows[0].get("trial_id") != path.stem:
        logger.warning("passed over %s: it holds no row of that trial", path)
        return None
    try:
        return _checked_row(rows[0])
    except (ValueError, OverflowError) as error:
        logger.warning("passed over %s: %s", path, error)
        return None


def _checked_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its nulls. Raises ValueError where a column of ours holds what it cannot hold, such as a number
    that is not finite, which is no result."""
    checked = {name: _checked(name, value) for name, value in row.items() if value is not None}
    if checked.get("status") not in STATUSES:
        raise ValueError(f"status {checked.get('status')!r} is not one of {', '.join(STATUSES)}")
    return checked


def _checked(name: str, value: Any) -> Any:
    """A value as its column has it; of columns that other versions or programs have added, plain or as text."""
    kind = REAL if name.startswith(OPEN_PREFIXES) else _TYPES.get(name)
    if kind is None:
        if isinstance(value, datetime):
            return _utc(value)
        return value if isinstance(value, str | bool) or _is_number(value) else str(value)
    if type(value) not in _EXACT[kind] or (kind == MOMENT and value.tzinfo is None):
        value = _converted(name, value, kind)
    if kind in (REAL, WHOLE) and not _is_number(value):
        raise ValueError(f"{name} is {value}: not a result")
    if kind == MOMENT:
        return _utc(value)
    return float(value) if kind == REAL else value


def _converted(name: str, value: Any, kind: pa.DataType) -> Any:
    """1.0 is 1 to other programs; true and text are no numbers."""
    try:
        if isinstance(value, bool) and kind != TRUTH:
            raise TypeError
        converted = pa.scalar(value, kind).as_py()
        if isinstance(value, float) and converted != value:
            raise ValueError
        return converted
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        raise ValueError(f"column {name} holds {str(value)[:60]!r}, not {kind}") from None


def _utc(moment: datetime) -> datetime:
    """Without a zone it counts as UTC, as in Arrow. Of pandas' own type too."""
    there = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return datetime.combine(there.date(), there.time(), UTC)


def _is_number(value: Any) -> bool:
    """Of those that a column can hold."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and -(2**63) <= value < 2**63


def _without_nulls(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{} for _ in range(table.num_rows)]
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count == len(column):
            continue
        for row, value in zip(rows, _python_values(column), strict=True):
            if value is not None:
                row[name] = value
    return rows


def _python_values(column: pa.ChunkedArray) -> list[Any]:
    """Moments by hand: pyarrow would import pandas to make them."""
    if column.type != MOMENT:
        values: list[Any] = column.to_pylist()
        return values
    numbers = (number for chunk in column.chunks for number in chunk.view(pa.int64()).to_pylist())
    return [None if number is None else _EPOCH + timedelta(microseconds=number) for number in numbers]


def _decode_row(stored: bytes) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(stored)
    for name in ("started_at", "finished_at"):
        if name in row:
            row[name] = datetime.fromisoformat(row[name])
    return row


def read_table(path: Path) -> pa.Table | None:
    """The rows of a file; None, with a warning, where it cannot be read."""
    try:
        with pq.ParquetFile(path) as file:
            return file.read()
    except FileNotFoundError:  # compacted since
        return None
    except (pa.ArrowException, OSError) as error:
        logger.warning("passed over %s: %s", path, error)
        return None


def _union_schema(rows: Sequence[dict[str, Any]]) -> pa.Schema:
    seen = dict.fromkeys(name for row in rows for name in row)
    schema = _known_schema(seen)
    for name in seen:
        if name not in schema.names:
            schema = schema.append(pa.field(name, _plain_column(rows, name)))
    return schema


def _known_schema(columns: Collection[str]) -> pa.Schema:
    """Our columns, with those `perplexity_<name>` and `task_<name>` that are among some."""
    names, tasks = (
        sorted(name.removeprefix(prefix) for name in columns if name.startswith(prefix))
        for prefix in (PERPLEXITY_PREFIX, TASK_PREFIX)
    )
    return trial_schema(names, tasks)


# Types of values, with that of a column of such, and what brings them to it.
_PLAIN: tuple[tuple[set[type], pa.DataType, Callable[[Any], Any]], ...] = (
    ({bool}, TRUTH, bool),
    ({int}, WHOLE, int),
    ({int, float}, REAL, float),
    ({datetime}, MOMENT, _utc),
)


def _plain_column(rows: Sequence[dict[str, Any]], name: str) -> pa.DataType:
    """The type of a column that is none of ours, to which all its values are brought: where they are of several kinds,
    text. Arrow would find it as well, and import pandas for that."""
    kinds = {type(row[name]) for row in rows if row.get(name) is not None}
    kind, bring = next((plain for known, *plain in _PLAIN if kinds <= known), (TEXT, str))
    for row in rows:
        if row.get(name) is not None:
            row[name] = bring(row[name])
    return kind


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    import pandas as pd  # not at once: a launch reads its rows without, and imports pandas with Tune, while Ray starts

    types = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}  # nulls must not turn 1 into 1.0
    frame: pd.DataFrame = table.to_pandas(types_mapper=types.get)
    return frame


def _nothing_yet(folder: Path) -> UsageError:
    return UsageError(
        f"the sweep in {folder} has no trial yet",
        remedy="`raysweep status` shows whether it is running; `raysweep launch` continues it",
    )
