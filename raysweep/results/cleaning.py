"""Removes from a sweep's folder what is no result: what launches keep to go on with."""

from __future__ import annotations

import shutil
from pathlib import Path

from raysweep.results.folders import RETRAINING, TUNE, UNFINISHED
from raysweep.results.lock import launch_lock
from raysweep.results.writer import remove_stale_temporaries


def clean(folder: Path) -> int:
    """Removes it; returns how many bytes that gave back. Rows, space, state and trace stay.

    Trials that were interrupted then begin anew. Raises UsageError while the sweep runs.
    """
    with launch_lock(folder):
        before = _size(folder)
        remove_stale_temporaries(folder)
        for place in (TUNE, RETRAINING, UNFINISHED):
            shutil.rmtree(folder / place, ignore_errors=True)
        return before - _size(folder)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
