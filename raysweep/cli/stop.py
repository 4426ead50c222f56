"""`raysweep stop`: ends a running sweep from another shell or host."""

from __future__ import annotations

from raysweep.cli.console import say
from raysweep.cli.numbers import count
from raysweep.launching.stopping import stop
from raysweep.results.folders import bring_up_to_date, sweep_folder
from raysweep.results.lock import holder_of
from raysweep.results.reader import row_count
from raysweep.results.uris import place_of

PATIENCE_S = 300.0  # Ray's processes take up to a minute to end; assumption: a large model's a few


def run_stop(name: str, storage: str | None) -> None:
    folder = sweep_folder(name, storage)
    if holder_of(folder) is not None:
        say(f"asking {folder.name} to end; it finishes the units in hand first")
    holder = stop(folder, PATIENCE_S)
    bring_up_to_date(folder)
    rows = count(row_count(folder), "row")
    say(
        f"{folder.name}, {holder}, has ended; {rows} kept in {place_of(folder)}; the same launch continues it"
    )
