"""Removes from a sweep's folder what is no result, and puts its rows together, as launches of many trials do too."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from raysweep.results.atomic import remove_stale_temporaries
from raysweep.results.compaction import compact
from raysweep.results.folders import ARTIFACTS, RETRAINING, TRIALS, TUNE, UNFINISHED, row_files
from raysweep.results.lock import launch_lock
from raysweep.results.mirror import push, push_removal

MANY = (
    1000  # files of single trials, of which the next launch would read each: about half a millisecond a file
)


@dataclass(frozen=True)
class Cleaned:
    """nbytes: that were given back;  files: of finished trials that became two"""

    nbytes: int
    files: int


def clean(folder: Path, artifacts: bool = False) -> Cleaned:
    """Removes what launches keep to go on with, and puts the rows of finished trials together.

    All rows, space, state and trace stay. Trials that were interrupted then begin anew. Raises UsageError while the
    sweep runs.

    artifacts: remove kept trials as well
    """
    with launch_lock(folder, "clean"):
        push(folder)
        before = _size(folder)
        remove_stale_temporaries(folder)
        for place in (TUNE, RETRAINING, UNFINISHED, *([ARTIFACTS] if artifacts else [])):
            shutil.rmtree(folder / place, ignore_errors=True)
        gone = _put_together(folder)
        return Cleaned(before - _size(folder), gone)


def put_many_together(folder: Path) -> None:
    """Puts the rows of finished trials together where they have many files. Who calls holds the sweep, and has pushed
    what a remote storage lacks. Raises StorageError, and then every row is there."""
    if len(list(row_files(folder, TRIALS))) >= MANY:
        _put_together(folder)


def _put_together(folder: Path) -> int:
    gone = compact(folder)
    push(folder)
    push_removal(folder, gone)
    return len(gone)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
