"""Puts the files of finished trials together, whose rows are never written again: thousands of files become two."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from raysweep.results.folders import TRIALS, UNITS, compacted_file, row_files
from raysweep.results.reader import in_threads, own_rows, read_compacted, read_table, row_table, united
from raysweep.results.schema import OPEN_PREFIXES, trial_schema, unit_schema
from raysweep.results.writer import write_table


def compact(folder: Path) -> list[Path]:
    """Puts the rows of finished trials into one file and their units into another; returns the files that are gone.

    Who calls holds the sweep. Whatever ends it in between, every trial stays visible with its units: they are in the
    new files before their own are removed, and until then those count. Rows with columns that this version does not
    know, or without readable units, stay where they are. Raises StorageError, with everything as it was.
    """
    units = {path.stem: path for path in row_files(folder, UNITS)}
    own = own_rows(folder)
    fresh = [row for row in own.values() if row["status"] == "finished" and _is_known(row)]
    before = read_compacted(folder, TRIALS, own)
    # Beside those of `fresh`, the units of trials whose own rows an earlier call had removed when it was ended.
    wanted = {row["trial_id"] for row in fresh} | set(before["trial_id"].to_pylist())
    tables = {
        path.stem: table
        for path, table in in_threads(read_table, [units[i] for i in sorted(wanted & set(units))])
        if table is not None and table.schema.equals(unit_schema())
    }
    # Of trials that were put together before, and whose rows were written again since, the units lie there.
    together = set(read_compacted(folder, TRIALS, (), ["trial_id"])["trial_id"].to_pylist())
    fresh = [row for row in fresh if row["trial_id"] in tables or row["trial_id"] in together]
    if len({*tables, *(row["trial_id"] for row in fresh)}) + compacted_file(folder, TRIALS).exists() < 2:
        return []  # one file would become one
    kept = read_compacted(folder, UNITS, tables)
    kept = kept.filter(pc.is_in(kept["trial_id"], pa.array(sorted(wanted), pa.string())))
    write_table(compacted_file(folder, UNITS), pa.concat_tables([kept, *tables.values()]))
    if fresh:
        write_table(compacted_file(folder, TRIALS), united([before, row_table(fresh)]))
    gone = [folder / TRIALS / f"{row['trial_id']}.parquet" for row in fresh]
    gone += [units[identity] for identity in tables]
    for path in gone:
        path.unlink(missing_ok=True)
    return gone


def _is_known(row: dict[str, object]) -> bool:
    known = trial_schema().names
    return all(name in known or name.startswith(OPEN_PREFIXES) for name in row)
