"""`raysweep clean`: gives back the space that a sweep takes beyond its rows."""

from __future__ import annotations

from raysweep.cli.console import say
from raysweep.cli.numbers import count, large
from raysweep.results.cleaning import clean
from raysweep.results.folders import TRIALS, row_files, sweep_folder


def run_clean(name: str, storage: str | None) -> None:
    folder = sweep_folder(name, storage)
    freed = clean(folder)
    rows = count(sum(1 for _ in row_files(folder, TRIALS)), "row")
    say(f"{folder.name}: {large(freed)}B removed; {rows} kept in {folder}")
