"""One launch at a time for every sweep: a lock that ends with the process that holds it, whatever ends that."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from raysweep.errors import UsageError

LOCK_FILE = "launch.lock"


@dataclass(frozen=True)
class Holder:
    """The process that runs a sweep, as far as it is known."""

    host: str = "another host"
    pid: int | None = None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else f"a process on {self.host}"


@contextmanager
def launch_lock(folder: Path) -> Iterator[None]:
    """Holds the sweep in `folder`, which is there, within the context. Raises UsageError where another process does.

    The kernel keeps the lock (flock, on network file systems too), so that one of a dead process does not exist. On
    file systems that cannot lock, nothing is held.
    """
    path = folder / LOCK_FILE
    stream = _acquired(path)
    try:
        stream.truncate(0)
        stream.write(json.dumps(asdict(Holder(socket.gethostname(), os.getpid()))))
        stream.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        stream.close()


def holder_of(folder: Path) -> Holder | None:
    """Who runs the sweep now; None where nobody does."""
    try:
        with open(folder / LOCK_FILE, encoding="utf-8") as stream:
            return None if _try(stream, fcntl.LOCK_SH) else _read(stream)
    except OSError:
        return None


def refuse_where_held(folder: Path) -> None:
    """Raises UsageError where a process runs the sweep."""
    holder = holder_of(folder)
    if holder is not None:
        raise UsageError(
            f"the sweep {folder.name!r} is running already, as {holder}",
            remedy=f"Wait for it, end it with `raysweep stop {folder.name}`, or choose another --name.",
        )


def _acquired(path: Path) -> IO[str]:
    """The file of the lock, locked. One that its last holder has just removed is no lock any more."""
    while True:
        stream = open(path, "a+", encoding="utf-8")  # noqa: SIM115  # open for as long as it is locked
        try:
            if not _try(stream, fcntl.LOCK_EX):
                refuse_where_held(path.parent)
            elif path.exists() and os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                return stream
        except BaseException:
            stream.close()
            raise
        stream.close()


def _try(stream: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _read(stream: IO[str]) -> Holder:
    try:
        return Holder(**json.loads(stream.read()))
    except (ValueError, TypeError):  # it has not yet said who it is
        return Holder()
