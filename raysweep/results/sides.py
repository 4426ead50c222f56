"""The two sides of a remote sweep, its mirror and its storage: what differs, and copying it either way.

A record in the mirror says of each file what both sides were when they were alike, so that changes of each can be told:
what a killed launch has not copied yet, and what another machine has written since.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysweep.results.atomic import write_atomically
from raysweep.results.folders import COMPACTED, TRIALS, UNITS, is_sweep_file
from raysweep.results.remote import Remote, Stamp

RECORD_FILE = ".alike"
SPARE_LINES = 1000  # of the record, before it is shortened
TRANSFERS = 8  # at a time; each waits for the storage nearly all the time

Local = tuple[int, int]  # size and moment of writing (ns)


class Sides:
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
            complete &= all(in_threads(lambda name: self._fetch(name, there[name]), names))
        for name in gone:  # listed with trials first
            if self._alike[name][0] == here[name]:
                (self.folder / name).unlink(missing_ok=True)
        self._shorten_record()
        return complete

    def push(self) -> int:
        changed = self.changed_here()
        for names in _in_order(changed):
            in_threads(lambda name: self._send(name, changed[name]), names)
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


def in_threads(do: Callable[[str], Any], names: list[str]) -> list[Any]:
    with ThreadPoolExecutor(TRANSFERS) as threads:
        return list(threads.map(do, names))
