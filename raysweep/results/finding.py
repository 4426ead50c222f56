"""Finds a trial by what people type: its id, or the beginning of it, perhaps behind its sweep's name. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from raysweep.errors import UsageError, nearest_name
from raysweep.results.folders import list_sweeps, storage_folder, sweep_folder
from raysweep.results.reader import trial_ids, trial_rows
from raysweep.results.uris import mirrored_uri, place_of

ALLOWED = "a trial_id, or its first digits, as `raysweep results --json` shows it; or SWEEP:TRIAL"
SHOWN = 5  # of ids that begin alike

_DIGITS = re.compile("[0-9a-f]{1,16}")


def find_trial(text: str, storage: str | Path | None = None) -> tuple[Path, dict[str, Any]]:
    """The folder of a trial's sweep, and its row without what is null.

    text: the trial's id or the beginning of it; SWEEP:ID where several sweeps have it. SWEEP as of `sweep_folder`
    Raises UsageError where there is none, or more than one.
    """
    sweep, _, typed = text.rpartition(":")
    identity = typed.strip().lower()
    folders = [sweep_folder(sweep, storage)] if sweep else _all_sweeps(storage)
    ids = {folder: trial_ids(folder) for folder in folders}
    found = [(folder, one) for folder, mine in ids.items() for one in mine if one.startswith(identity)]
    if not _DIGITS.fullmatch(identity) or not found:
        known = [one for mine in ids.values() for one in mine]
        where = f"sweep {sweep!r}" if sweep else f"the sweeps of {_place(storage)}"
        raise UsageError(
            f"no trial {typed!r} in {where}", allowed=ALLOWED, nearest=nearest_name(identity, known)
        )
    distinct = sorted({one for _, one in found})
    if len(distinct) > 1:
        shown = ", ".join(distinct[:SHOWN]) + (", ..." if len(distinct) > SHOWN else "")
        raise UsageError(f"{len(distinct)} trials begin with {identity!r}", allowed=f"more digits: {shown}")
    if len(found) > 1:
        raise UsageError(
            f"trial {distinct[0]} lies in {len(found)} sweeps",
            allowed=", ".join(f"{folder.name}:{distinct[0]}" for folder, _ in found),
        )
    ((folder, whole),) = found
    rows = trial_rows(folder)
    if whole not in rows:
        raise UsageError(f"the row of trial {whole} in {place_of(folder)} cannot be read")
    return folder, rows[whole]


def _all_sweeps(storage: str | Path | None) -> list[Path]:
    root = storage_folder(storage)
    return [sweep_folder(name, storage) for name in list_sweeps(root)]


def _place(storage: str | Path | None) -> str:
    root = storage_folder(storage)
    return mirrored_uri(root) or str(root)
