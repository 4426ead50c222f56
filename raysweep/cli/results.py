"""`raysweep results`: the table of a sweep that has run, or is running."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.cli.console import json_rows, output, print_json
from raysweep.config.sections import SearchConfig
from raysweep.config.space import SearchSpace
from raysweep.errors import RaysweepError, UsageError
from raysweep.results.folders import SPACE_FILE, has_rows, list_sweeps, storage_folder, sweep_folder
from raysweep.results.uris import mirrored_uri, place_of

if TYPE_CHECKING:
    import pandas as pd


def run_results(name: str | None, sort: str | None, storage: str | None, as_json: bool) -> None:
    from raysweep.results.reader import load_results

    folder = sweep_folder(name or only_sweep(storage), storage)
    show_rows(folder, load_results(folder), sort, as_json)


def only_sweep(storage: str | None) -> str:
    """The one sweep of a storage; raises UsageError when there are none or several."""
    root = storage_folder(storage)
    known, shown = list_sweeps(root), mirrored_uri(root) or root
    if len(known) == 1:
        return known[0]
    raise UsageError(
        f"{shown} holds {len(known)} sweeps: which one?" if known else f"{shown} holds no sweep yet",
        allowed=", ".join(known) or None,
        remedy=None if known else "run `raysweep launch`, or name another --storage",
    )


def show_rows(folder: Path, rows: pd.DataFrame, sort: str | None = None, as_json: bool = False) -> None:
    """Rows on stdout: as a table, or as one JSON document."""
    from raysweep.analysis.table import best_rows, sorted_rows
    from raysweep.cli.table import print_summary

    if as_json:
        ordered = sorted_rows(rows, sort)
        print_json({"sweep": folder.resolve().name, "folder": place_of(folder), "rows": json_rows(ordered)})
        return
    search = search_of(folder)
    best = best_rows(rows, search.metric, search.mode, search.compare_within)
    print_summary(output(), rows, sort, best)


def labeled_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a sweep that may have none yet, with labels."""
    if not has_rows(folder):
        return []
    from raysweep.analysis.table import records, trial_label
    from raysweep.results.reader import load_results

    try:
        rows = load_results(folder)
    except RaysweepError:  # files that are none of ours
        return []
    return [row | {"label": trial_label(row)} for row in records(rows)]


def search_of(folder: Path) -> SearchConfig:
    """What best means in a sweep; the defaults when its space cannot be read by this version."""
    try:
        return SearchSpace.from_yaml(folder / SPACE_FILE).search
    except RaysweepError:
        return SearchConfig()
