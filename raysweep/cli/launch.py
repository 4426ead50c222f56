"""`raysweep launch`: runs a sweep under a display, prints its table, and says how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysweep.analysis.rows import records
from raysweep.cli.console import quiet_libraries, say
from raysweep.cli.display import shown
from raysweep.cli.ending import FAILED, clean_interruptions, interruption_status, show_traceback
from raysweep.cli.numbers import count, duration
from raysweep.cli.results import Choice, labeled_rows, show_rows
from raysweep.cli.spaces import load_space
from raysweep.cli.tally import Tally
from raysweep.config.space import SearchSpace
from raysweep.importing import without_collecting
from raysweep.results.folders import (
    RETRAINING,
    TRACE_FILE,
    bring_up_to_date,
    new_sweep_folder,
    storage_folder,
    unfinished_units,
)
from raysweep.results.uris import place_of


def run_launch(
    space: str,
    settings: Sequence[str],
    name: str | None,
    as_json: bool,
    options: Mapping[str, Any],
) -> int:
    """options: of `raysweep.launch`"""
    loaded = load_space(space, settings, name)
    folder = new_sweep_folder(loaded.name, storage_folder(options["storage"], loaded.execution.storage))
    bring_up_to_date(folder)
    tally = Tally.of(loaded, [row for row in labeled_rows(folder) if row["status"] != "failed"])
    trace_before = _trace_time(folder)
    try:
        with clean_interruptions():
            rows = _run(loaded, tally, options)
    except KeyboardInterrupt as interruption:
        show_traceback()
        _say_kept(folder)
        if options["trace"]:
            say("--trace: a launch that is interrupted leaves none", "dim")
        return interruption_status(interruption)
    show_rows(folder, records(rows), Choice(as_json=as_json))
    if options["trace"]:
        there = f"trace in {_short_path(folder)}/{TRACE_FILE}, for https://ui.perfetto.dev"
        say("--trace: nothing was left to run" if _trace_time(folder) == trace_before else there)
    return _say_ending(folder, len(rows), tally, bool(options["fail_fast"]))


def _run(space: SearchSpace, tally: Tally, options: Mapping[str, Any]) -> Any:
    quiet_libraries()
    with shown(tally) as display:
        display.stage("Loading libraries")
        with without_collecting():
            from raysweep.launching.launch import launch

        return launch(space, progress=display, **options)


def _trace_time(folder: Path) -> float | None:
    """When the sweep's trace was written, if it has one."""
    trace = folder / TRACE_FILE
    return trace.stat().st_mtime if trace.exists() else None


def _say_kept(folder: Path) -> None:
    from raysweep.results.reader import row_count
    from raysweep.shards.retrained import DONE

    kept = {
        "row": row_count(folder),
        "finished retraining": len(list((folder / RETRAINING).glob(f"*/{DONE}"))),
        "recovered unit": unfinished_units(folder),
    }
    parts = [count(number, what) for what, number in kept.items() if number]
    where = f"{' and '.join(parts)} kept in {_short_path(folder)}" if parts else "nothing had finished"
    say(f"interrupted: {where}; the same command continues the sweep")


def _say_ending(folder: Path, rows: int, tally: Tally, fail_fast: bool) -> int:
    """The last line; and the exit status."""
    path = _short_path(folder)
    if tally.heard:
        _say_reality(folder)
    say(f'{count(rows, "row")} in {path}; in pandas: raysweep.load_results("{path}")')
    missing = tally.planned - tally.done
    if missing > 0 and fail_fast and tally.failures:
        say(f"--fail-fast: nothing new began after {tally.failures[0][0]} had failed", "red")
    if missing > 0:
        say(f"{count(missing, 'trial')} did not run to an end; the same command runs {_them(missing)}", "red")
    if tally.to_stay:
        again = f"only --retry-failed runs {_them(tally.to_stay)} again"
        say(f"{count(tally.to_stay, 'trial')} failed numerically; {again}", "red")
    return FAILED if tally.failed or missing > 0 else 0


def _say_reality(folder: Path) -> None:
    """took 43 s (planned 40 s); a shard held up to 945 MiB (planned 1181 MiB)"""
    from raysweep.launching.reality import Reality
    from raysweep.shards.plan import format_bytes

    if (found := Reality.read(folder)) is None:
        return
    planned = f" (planned {duration(found.planned_seconds)})" if found.planned_seconds is not None else ""
    who = "the process" if found.in_process else "a shard"
    parts = [f"took {duration(found.seconds)}{planned}"]
    for where, peak in (("", found.host), (" of its GPU", found.device)):
        if peak is not None:
            parts.append(
                f"{who} held up to {format_bytes(peak.measured)}{where} (planned {format_bytes(peak.planned)})"
            )
    say("; ".join(parts))


def _them(number: int) -> str:
    return "it" if number == 1 else "them"


def _short_path(folder: Path) -> str:
    """Relative where it lies below the current folder; of a remote one its URI."""
    place, here = place_of(folder), Path.cwd()
    return str(Path(place).relative_to(here)) if Path(place).is_relative_to(here) else place
