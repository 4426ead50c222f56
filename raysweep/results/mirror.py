"""Keeps the mirror of a remote sweep and its storage alike: rows, space and state, units always before their trials.

Everything else (units in flight, checkpoints, the state of Tune) lies in the mirror alone.
"""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from raysweep.errors import StorageError, first_line
from raysweep.results.folders import TRIALS, UNITS
from raysweep.results.lock import local_holder
from raysweep.results.remote import remote_of
from raysweep.results.sides import Sides, in_threads

PULLS = 5  # where files are removed while they are copied, as `raysweep clean` on another machine does
PUSH_EVERY_S = 1.0
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # before a push is tried again

log = logging.getLogger(__name__)


def pull(folder: Path) -> None:
    """Brings the mirror of a remote sweep up to date; does nothing for other folders.

    A process of this machine that runs the sweep keeps it so by itself. Raises UsageError where the storage cannot be
    reached, StorageError where it ceases to answer.
    """
    if local_holder(folder) is None:
        pull_in_hand(folder)


def pull_in_hand(folder: Path) -> None:
    """As `pull`, for who holds the sweep: until it was his, another machine may have brought rows."""
    if (remote := remote_of(folder)) is None:
        return
    with open(folder.parent / f".{folder.name}.pull", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # two that pull at once would do everything twice
        for _ in range(PULLS):
            if Sides(folder, remote).pull():
                return
    raise StorageError(
        f"{remote.uri} changes faster than it can be read"
    )  # what was listed was gone, each time


def push(folder: Path) -> int:
    """Copies what is new in the mirror of a remote sweep to its storage; returns how many files. Who calls holds the
    sweep. Raises StorageError."""
    remote = remote_of(folder)
    return 0 if remote is None else Sides(folder, remote).push()


def push_removal(folder: Path, files: Iterable[Path]) -> None:
    """Removes files from the storage of a remote sweep, in this order. Raises StorageError."""
    remote = remote_of(folder)
    if remote is not None:
        names = [path.relative_to(folder).as_posix() for path in files]
        for part in (TRIALS, UNITS):
            in_threads(remote.remove, [name for name in names if name.startswith(f"{part}/")])


def lags(folder: Path) -> bool:
    """Whether the mirror of a remote sweep has what its storage has not, as far as is known here."""
    remote = remote_of(folder)
    return remote is not None and bool(Sides(folder, remote).changed_here())


@contextmanager
def pushing(folder: Path, held: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Pushes within the context, every second and at its end; yields what raises StorageError once that has failed
    again and again. held: raises where the sweep is no longer ours
    """
    remote = remote_of(folder)
    if remote is None:
        yield held
        return
    pusher = _Pusher(Sides(folder, remote), held)
    try:
        yield pusher.check
    except BaseException:
        try:
            pusher.end()
        except StorageError as error:  # what ended the sweep is told instead
            log.warning("%s", first_line(error))
        raise
    pusher.end()


class _Pusher:
    """A thread that pushes, and pauses where that fails."""

    def __init__(self, sides: Sides, held: Callable[[], None]) -> None:
        self._sides, self._held = sides, held
        self._failure: StorageError | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raysweep push", daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        self._try()
        self.check()

    def _run(self) -> None:
        while self._failure is None and not self._ended.wait(PUSH_EVERY_S):
            self._try()

    def _try(self) -> None:
        """Pushes once, if need be in several attempts."""
        for pause in (*PAUSES_S, None):
            if self._failure is not None:
                return
            try:
                self._held()
                self._sides.push()
                return
            except StorageError as error:
                if pause is None:
                    self._failure = StorageError(
                        f"{error.message}\n  All rows lie in {self._sides.folder}; once the storage answers again, the "
                        "same command copies them and continues the sweep."
                    )
                    return
                log.warning("%s; trying again", first_line(error))
                time.sleep(pause)
            except Exception as error:  # of a thread nobody would hear
                self._failure = StorageError(f"rows cannot be copied to their storage: {first_line(error)}")
