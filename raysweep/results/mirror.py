"""Keeps the mirror of a remote sweep and its storage alike: rows, space and state, units always before their trials.

Everything else (units in flight, checkpoints, the state of Tune) lies in the mirror alone. A file of its own in the
mirror notes of each file what both sides were when they were alike, so that each side's changes can be told.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysweep.errors import StorageError, first_line
from raysweep.results.folders import (
    COMPACTED,
    TRIALS,
    UNITS,
    is_sweep_file,
)
from raysweep.results.lock import local_holder
from raysweep.results.remote import Remote, Stamp, remote_of
from raysweep.results.writer import write_atomically

RECORD_FILE = ".alike"
TRANSFERS = 8  # at a time; each waits for the storage nearly all the time
PUSH_EVERY_S = 1.0
PULLS = 5  # where files are removed while they are copied, as `raysweep clean` on another machine does
SPARE_LINES = 1000  # of the record, before it is shortened
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # before a push is tried again

Local = tuple[int, int]  # size and moment of writing (ns)

log = logging.getLogger(__name__)


def pull(folder: Path) -> None:
    """Brings the mirror of a remote sweep up to date; does nothing for other folders.

    A process of this machine that runs the sweep keeps it so by itself. Raises UsageError where the storage cannot be
    reached, StorageError where it ceases to answer.
    """
    if local_holder(folder) is not None or (remote := remote_of(folder)) is None:
        return
    with open(folder.parent / f".{folder.name}.pull", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # two that pull at once would do everything twice
        for _ in range(PULLS):
            if _Sides(folder, remote).pull():
                return
    raise StorageError(
        f"{remote.uri} changes faster than it can be read"
    )  # what was listed was gone, each time


def push(folder: Path) -> int:
    """Copies what is new in the mirror of a remote sweep to its storage; returns how many files. Who calls holds the
    sweep. Raises StorageError."""
    remote = remote_of(folder)
    return 0 if remote is None else _Sides(folder, remote).push()


def push_removal(folder: Path, files: Iterable[Path]) -> None:
    """Removes files from the storage of a remote sweep, in this order. Raises StorageError."""
    remote = remote_of(folder)
    if remote is not None:
        names = [path.relative_to(folder).as_posix() for path in files]
        for part in (TRIALS, UNITS):
            _in_threads(remote.remove, [name for name in names if name.startswith(f"{part}/")])


def lags(folder: Path) -> bool:
    """Whether the mirror of a remote sweep has what its storage has not, as far as is known here."""
    remote = remote_of(folder)
    return remote is not None and bool(_Sides(folder, remote).changed_here())


@contextmanager
def pushing(folder: Path, held: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Pushes within the context, every second and at its end; yields what raises StorageError once that has failed
    again and again. held: raises where the sweep is no longer ours
    """
    remote = remote_of(folder)
    if remote is None:
        yield held
        return
    pusher = _Pusher(_Sides(folder, remote), held)
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

    def __init__(self, sides: _Sides, held: Callable[[], None]) -> None:
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


class _Sides:
    """The mirror and the storage of one sweep, and what is known of both."""

    def __init__(self, folder: Path, remote: Remote) -> None:
        self.folder, self.remote = folder, remote
        self._record = folder / RECORD_FILE
        self._alike = self._read_record()
        self._writing = threading.Lock()

    def pull(self) -> bool:
        """Whether all that was listed could be copied."""
        there = {name: stamp for name, stamp in self.remote.listing().items() if is_sweep_file(name)}
        here = self._local()
        wanted = [name for name, stamp in there.items() if self._is_newer_there(name, stamp, here)]
        gone = [name for name in here if name not in there and name in self._alike]
        complete = True
        for names in _in_order(wanted):
            complete &= all(_in_threads(lambda name: self._fetch(name, there[name]), names))
        for name in gone:  # listed with trials first
            if self._alike[name][0] == here[name]:
                (self.folder / name).unlink(missing_ok=True)
        self._shorten_record()
        return complete

    def push(self) -> int:
        changed = self.changed_here()
        for names in _in_order(changed):
            _in_threads(lambda name: self._send(name, changed[name]), names)
        return len(changed)

    def changed_here(self) -> dict[str, Local]:
        here = self._local()
        return {name: local for name, local in here.items() if self._known(name)[0] != local}

    def _is_newer_there(self, name: str, stamp: Stamp, here: dict[str, Local]) -> bool:
        if name not in here:
            return True
        local, known = self._known(name)
        if known == stamp:
            return False
        # Changed on both sides: another machine has run what this one had not pushed. Finished rows are equal.
        return local == here[name] or not self._is_finished_here(name)

    def _is_finished_here(self, name: str) -> bool:
        part, _, file = name.partition("/")
        if part not in (TRIALS, UNITS) or file == COMPACTED:
            return False
        try:
            return bool(pq.read_table(self.folder / TRIALS / file)["status"].to_pylist() == ["finished"])
        except (OSError, pa.ArrowException, KeyError):
            return False

    def _fetch(self, name: str, stamp: Stamp) -> bool:
        content = self.remote.read(name)
        if content is None:
            return False
        path = self.folder / name
        write_atomically(path, content)
        self._note(name, _local_of(path), stamp)
        return True

    def _send(self, name: str, local: Local) -> None:
        """local: before it was read, so that a later change is seen"""
        self.remote.write(name, (self.folder / name).read_bytes())
        stamp = self.remote.stamp(name)
        if stamp is not None:
            self._note(name, local, stamp)

    def _local(self) -> dict[str, Local]:
        """Trials are listed before units, so that those of every trial are among them."""
        found: dict[str, Local] = {}
        for part in (TRIALS, UNITS, ""):
            with suppress(FileNotFoundError), os.scandir(self.folder / part) as entries:
                for entry in entries:  # by texts: paths would take ten times as long, every second
                    name = f"{part}/{entry.name}" if part else entry.name
                    if is_sweep_file(name):
                        with suppress(FileNotFoundError):
                            stat = entry.stat()
                            found[name] = (stat.st_size, stat.st_mtime_ns)
        return found

    def _known(self, name: str) -> tuple[Local | None, Stamp | None]:
        return self._alike.get(name, (None, None))

    def _note(self, name: str, local: Local, stamp: Stamp) -> None:
        """One line in one write, which processes do not mix."""
        line = json.dumps([name, local, stamp]) + "\n"
        with self._writing, open(self._record, "a", encoding="utf-8") as stream:
            stream.write(line)
            self._alike[name] = (local, stamp)

    def _shorten_record(self) -> None:
        """The last line of every file is enough; the state has one for every push."""
        if self._lines > 2 * len(self._alike) + SPARE_LINES:
            lines = [json.dumps([name, *pair]) for name, pair in self._alike.items()]
            write_atomically(self._record, ("\n".join(lines) + "\n").encode())

    def _read_record(self) -> dict[str, tuple[Local, Stamp]]:
        try:
            lines = self._record.read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        self._lines = len(lines)
        found = {}
        for line in lines:
            try:
                name, (size, moment), stamp = json.loads(line)
                found[name] = ((size, moment), Stamp(*stamp))
            except (ValueError, TypeError):  # cut off when its writer was killed
                continue
        return found


def _local_of(path: Path) -> Local:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _in_order(names: Iterable[str]) -> list[list[str]]:
    """Units, then trials, then what tells of them: whatever is visible is complete."""
    groups: dict[int, list[str]] = {}
    for name in names:
        rank = 0 if name.startswith(f"{UNITS}/") else 1 if name.startswith(f"{TRIALS}/") else 2
        groups.setdefault(rank, []).append(name)
    return [groups[rank] for rank in sorted(groups)]


def _in_threads(do: Callable[[str], Any], names: list[str]) -> list[Any]:
    with ThreadPoolExecutor(TRANSFERS) as threads:
        return list(threads.map(do, names))
