"""`raysweep clean`: gives back the space that a sweep takes beyond its rows, and puts those together."""

from __future__ import annotations

from raysweep.cli.console import say
from raysweep.cli.numbers import count, large
from raysweep.results.cleaning import clean
from raysweep.results.folders import sweep_folder
from raysweep.results.reader import row_count
from raysweep.results.uris import place_of


def run_clean(name: str, storage: str | None, artifacts: bool = False) -> None:
    folder = sweep_folder(name, storage)
    cleaned = clean(folder, artifacts)
    together = f"; {cleaned.files:,} files of finished trials became two" if cleaned.files else ""
    kept = f"{count(row_count(folder), 'row')} kept in {place_of(folder)}"
    say(f"{folder.name}: {large(cleaned.nbytes)}B removed{together}; {kept}")
