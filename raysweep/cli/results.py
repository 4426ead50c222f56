"""`raysweep results`: the table of a sweep that has run, or is running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raysweep.analysis.rows import trial_label
from raysweep.cli.console import json_rows, output, print_csv, print_json, say
from raysweep.cli.numbers import count
from raysweep.config.document import Document
from raysweep.config.sections import SearchConfig
from raysweep.errors import RaysweepError, UsageError
from raysweep.importing import without_collecting
from raysweep.results.folders import SPACE_FILE, has_rows, list_sweeps, storage_folder, sweep_folder
from raysweep.results.uris import mirrored_uri, place_of

CSV_BEGINS = "trial_id,"  # the first column of all rows


@dataclass(frozen=True)
class Choice:
    """Which rows of a sweep are shown, in which order, as what: the options of `raysweep results`."""

    sort: str | None = None
    where: str | None = None
    pareto: bool = False
    as_json: bool = False
    as_csv: bool = False

    def check(self) -> None:
        """Raises UsageError for options that exclude one another."""
        if self.as_json and self.as_csv:
            raise UsageError("--json and --csv exclude one another", remedy="Leave one out.")

    def words(self) -> list[str]:
        """As on a command line, without the form of the output."""
        given = {"--sort": self.sort, "--where": self.where}
        valued = [word for option, value in given.items() if value is not None for word in (option, value)]
        return [*valued, *(["--pareto"] if self.pareto else [])]


def run_results(name: str | None, choice: Choice, storage: str | None) -> None:
    choice.check()
    folder = sweep_folder(name or only_sweep(storage), storage)
    with without_collecting():  # pyarrow, a third of what the command takes
        from raysweep.results.reader import load_rows

    show_rows(folder, load_rows(folder), choice)


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


def show_rows(folder: Path, rows: Sequence[dict[str, Any]], choice: Choice | None = None) -> None:
    """The rows of a sweep on stdout: as a table, as one JSON document, or as CSV."""
    from raysweep.analysis.table import best_rows, sort_column, sorted_rows
    from raysweep.cli.table import print_summary

    choice, search = choice or Choice(), search_of(folder)
    sort_column(choice.sort, rows)  # a wrong one is refused, whatever is chosen
    chosen = _chosen(rows, choice, search)
    if choice.as_json:
        ordered = sorted_rows(chosen, choice.sort)
        print_json({"sweep": folder.resolve().name, "folder": place_of(folder), "rows": json_rows(ordered)})
    elif choice.as_csv:
        print_csv(list(rows[0]), sorted_rows(chosen, choice.sort))
    elif chosen:
        best = best_rows(rows, search.metric, search.mode, search.compare_within)
        print_summary(output(), chosen, choice.sort, best)
    else:
        say("\n  ".join([f"none of {count(len(rows), 'trial')} is chosen", *_why_none(rows, choice)]))


def _chosen(rows: Sequence[dict[str, Any]], choice: Choice, search: SearchConfig) -> Sequence[dict[str, Any]]:
    if choice.where is None and not choice.pareto:
        return rows
    with without_collecting():  # pandas, which nothing else here needs
        from raysweep.analysis.pareto import front_rows
        from raysweep.analysis.where import rows_where
        from raysweep.results.reader import frame_of

    frame = frame_of(rows)
    if choice.where is not None:
        frame = rows_where(frame, choice.where)
    if choice.pareto:
        frame = front_rows(frame, search.metric, search.mode)
    return [rows[place] for place in frame.index]


def _why_none(rows: Sequence[dict[str, Any]], choice: Choice) -> list[str]:
    from raysweep.analysis.where import texts_of_no_row
    from raysweep.results.reader import frame_of

    return [] if choice.where is None else texts_of_no_row(frame_of(rows), choice.where)


def labeled_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a sweep that may have none yet, with labels."""
    if not has_rows(folder):
        return []
    from raysweep.results.reader import load_rows

    try:
        rows = load_rows(folder)
    except RaysweepError:  # files that are none of ours
        return []
    return [row | {"label": trial_label(row)} for row in rows]


def search_of(folder: Path) -> SearchConfig:
    """What best means in a sweep; the defaults where this version cannot read that. Nothing else of its space is looked
    at: to make the whole would take longer than to read the rows."""
    try:
        data = Document.read(folder / SPACE_FILE).data
        section = data.get("search") if isinstance(data, dict) else None
        return SearchConfig.model_validate(section or {})
    except (RaysweepError, ValidationError):
        return SearchConfig()
