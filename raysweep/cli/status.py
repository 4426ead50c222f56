"""`raysweep status`: which sweeps a storage holds, and how far they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.cli.cells import best_cells
from raysweep.cli.console import new_table, output, print_json, say, terminal_height
from raysweep.cli.numbers import duration, large
from raysweep.cli.results import labeled_rows
from raysweep.config.space import SearchSpace
from raysweep.errors import RaysweepError
from raysweep.results.folders import SPACE_FILE, list_sweeps, storage_folder, sweep_folder
from raysweep.results.lock import LAUNCH, holder_of, local_holder
from raysweep.results.remote import remote_of
from raysweep.results.state import SweepState
from raysweep.results.uris import mirrored_uri, place_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from raysweep.cli.tally import Tally

LINES_BESIDE_CELLS = 16  # of what is said about a running sweep

STYLES = {
    "starting": "cyan",
    "running": "cyan",
    "finished": "green",
    "failed": "red",
    "interrupted": "yellow",
}


def run_status(name: str | None, storage: str | None, as_json: bool) -> None:
    root = storage_folder(storage)
    folders = [sweep_folder(known, storage) for known in ([name] if name else list_sweeps(root))]
    documents = [sweep_status(folder) for folder in folders]
    if as_json:
        print_json(documents[0] if name else documents)
    elif documents:
        console = output()
        _print_table(console, documents)
        for folder, one in zip(folders, documents, strict=True):
            if one["state"] == "running":
                _print_running(console, folder, one, in_full=name is not None)
    else:
        say(f"no sweep in {mirrored_uri(root) or root} yet: run `raysweep launch`, or name another --storage")


def sweep_status(folder: Path) -> dict[str, Any]:
    """What its launching process last said (null where nothing), with the rows counted as they lie there."""
    from raysweep.results.reader import trial_states

    rows = Counter(trial_states(folder).values())
    state = SweepState.read(folder)
    if state is not None and state.state == "running" and remote_of(folder) and holder_of(folder) is None:
        state = state.interrupted()  # of another machine no process can be seen
    said = asdict(state) if state else dict.fromkeys(asdict(SweepState("")))
    holder = local_holder(folder)
    told = state is not None and holder is not None and (state.host, state.pid) == (holder.host, holder.pid)
    if holder is not None and holder.task == LAUNCH and not told:
        said |= {"state": "starting", "pid": holder.pid, "host": holder.host}
    others = state.others if state else 0  # of another space than that of the last launch
    finished = max(0, rows["finished"] + rows["stopped"] - others)
    counted: dict[str, Any] = {"finished": finished, "failed": rows["failed"]}
    counted["seconds_left"] = _seconds_left(folder, state) if state and state.state == "running" else None
    return {**said, "name": folder.resolve().name, "folder": place_of(folder), **counted}


def _seconds_left(folder: Path, state: SweepState) -> float | None:
    """From the rows of the running launch and those before it, as its own display does."""
    from raysweep.cli.tally import TimeLeft

    try:
        planned = SearchSpace.from_yaml(folder / SPACE_FILE).typical()
    except RaysweepError:
        return None
    launched = datetime.fromisoformat(state.started_at)
    rows = [row for row in labeled_rows(folder) if row["started_at"] is not None]
    fresh = [row for row in rows if row["started_at"] >= launched]
    earlier = [row for row in rows if row["started_at"] < launched and row["status"] != "failed"]
    begun = min((row["started_at"] for row in fresh), default=launched)
    left = TimeLeft(planned, earlier)
    left.begin(state.planned, len(earlier), (datetime.now(UTC) - begun).total_seconds())
    for row in fresh:
        left.row(row)
    return left.seconds()


def _print_table(console: Console, documents: list[dict[str, Any]]) -> None:
    from rich.text import Text

    titles = ("sweep", "state", "finished", "failed", "shards", "started", "time left")
    table = _table(*titles, right=(2, 3, 4, 6))
    for one in documents:
        state = one["state"] or "unknown"
        table.add_row(
            one["name"],
            Text(state, style=STYLES.get(state, "dim")),
            f"{one['finished']} of {one['planned']}" if one["planned"] else str(one["finished"]),
            Text(str(one["failed"]), style="red" if one["failed"] else ""),
            "" if one["shards"] is None else str(one["shards"]),
            _since(one["started_at"]),
            "" if one["seconds_left"] is None or state != "running" else duration(one["seconds_left"]),
        )
    console.print(table)


def _print_running(console: Console, folder: Path, one: dict[str, Any], in_full: bool) -> None:
    """What the shards of a running sweep do; in full also the best trials so far, as the launch itself shows them."""
    from rich.text import Text

    if one["activity"]:
        console.print()
        console.print(_shard_table(one["activity"]))
    if in_full and (tally := _tally(folder)) is not None and tally.best:
        console.print()
        console.print(best_cells(tally, room=max(3, terminal_height() - LINES_BESIDE_CELLS)))
    if one["dashboard"]:
        console.print(Text(f"\ndashboard of {one['name']}: {one['dashboard']}"), soft_wrap=True)


def _shard_table(activity: list[dict[str, Any]]) -> Table:
    from rich.text import Text

    from raysweep.shards.plan import format_bytes

    rates = ("units\n/min", "trained\ntok/s", "eval\ntok/s")
    table = _table("shard", "busy", *rates, "kept", right=range(6))
    table.expand = True
    table.add_column("now", overflow="ellipsis", no_wrap=True, ratio=1)  # has the room that is left
    for shard, one in enumerate(activity):
        told = [one[f"{name}_per_second"] for name in ("units", "trained_tokens", "evaluated_tokens")]
        table.add_row(
            str(shard),
            "" if one["busy"] is None else f"{one['busy']:.0%}",
            "" if told[0] is None else f"{60 * told[0]:.1f}",
            *("" if rate is None else large(round(rate)) for rate in told[1:]),
            format_bytes(one["stored_bytes"]),
            Text(one["doing"] or "waits", style="" if one["doing"] else "dim"),
        )
    return table


def _tally(folder: Path) -> Tally | None:
    from raysweep.cli.tally import Tally

    try:
        return Tally.of(SearchSpace.from_yaml(folder / SPACE_FILE), labeled_rows(folder))
    except RaysweepError:
        return None


def _table(*titles: str, right: Container[int]) -> Table:
    """right: columns of numbers"""
    table = new_table()
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number in right else "left", overflow="fold")
    return table


def _since(moment: str | None) -> str:
    """3 min ago, else day and time, local."""
    if moment is None:
        return ""
    started = datetime.fromisoformat(moment)
    seconds = (datetime.now(UTC) - started).total_seconds()
    if 0 <= seconds < 3600:
        return f"{int(seconds // 60)} min ago"
    return f"{started.astimezone():%Y-%m-%d %H:%M}"
