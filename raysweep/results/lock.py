"""One launch at a time for every sweep: a lock that ends with the process that holds it, whatever ends that.

In a remote storage, across machines, it is a file with a heartbeat. Such storages do not compare and swap, so there it
is a best effort: two that begin within the same second may both begin, and one ends when it sees the other. Their rows
would be equal.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from raysweep.errors import StorageError, UsageError
from raysweep.results.atomic import process_lives
from raysweep.results.folders import LOCK_FILE
from raysweep.results.remote import Remote, remote_of

LAUNCH = "launch"
BEAT_S, STALE_S = (
    10.0,
    60.0,
)  # between heartbeats in a remote storage; without any, after which the holder is gone
SETTLE_S = 1.0  # in which another process that takes a remote lock at the same time has written it as well


@dataclass(frozen=True)
class Holder:
    """The process that has a sweep in hand, as far as it is known; and what it does with it."""

    host: str = "another host"
    pid: int | None = None
    task: str = LAUNCH

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else f"a process on {self.host}"


@contextmanager
def launch_lock(folder: Path, task: str = LAUNCH) -> Iterator[Callable[[], None]]:
    """Holds the sweep in `folder`, which is made, within the context. Raises UsageError where another process does.

    task: what for

    Yields what raises StorageError once the lock of a remote sweep is lost to another machine.
    """
    with _local_lock(folder, task):
        remote = remote_of(folder)
        if remote is None:
            yield _nothing_lost
            return
        beating = _Beating(folder, remote)
        try:
            yield beating.check
        finally:
            beating.end()


@contextmanager
def _local_lock(folder: Path, task: str) -> Iterator[None]:
    """The kernel keeps it (flock, on network file systems too), so that one of a dead process does not exist. On file
    systems that cannot lock, nothing is held.
    """
    path = folder / LOCK_FILE
    stream = _acquired(path)
    try:
        stream.truncate(0)
        stream.write(json.dumps(asdict(Holder(socket.gethostname(), os.getpid(), task))))
        stream.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        stream.close()


def holder_of(folder: Path) -> Holder | None:
    """Who runs the sweep now, on this machine or another; None where nobody does."""
    holder = local_holder(folder)
    if holder is not None or (remote := remote_of(folder)) is None:
        return holder
    return _remote_holder(remote, time.time())


def local_holder(folder: Path) -> Holder | None:
    """Who runs the sweep among the processes that see this very folder."""
    try:
        with open(folder / LOCK_FILE, encoding="utf-8") as stream:
            return None if _try(stream, fcntl.LOCK_SH) else _read(stream)
    except OSError:
        return None


def refuse_where_held(folder: Path) -> None:
    """Raises UsageError where a process runs the sweep."""
    holder = holder_of(folder)
    if holder is not None:
        raise _held(folder.name, holder)


def _held(name: str, holder: Holder) -> UsageError:
    return UsageError(
        f"the sweep {name!r} is running already, as {holder}",
        remedy=f"Wait for it, end it with `raysweep stop {name}`, or choose another --name.",
    )


class _Beating:
    """The lock in a remote storage: a file that is written again every few seconds for as long as it is held."""

    def __init__(self, folder: Path, remote: Remote) -> None:
        """Takes the lock: a free one, or one whose holder has ceased to write it."""
        self._remote, self._name = remote, folder.name
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self._content = json.dumps(mine).encode()
        self._lost: StorageError | None = None
        self._ended = threading.Event()
        holder = _remote_holder(remote, remote.now())
        if holder is None:
            remote.write(LOCK_FILE, self._content)
            time.sleep(SETTLE_S)
            if (found := remote.read(LOCK_FILE)) != self._content:
                holder = _holder_in(found or b"")
        if holder is not None:
            raise _held(folder.name, holder)
        self._thread = threading.Thread(target=self._run, name="raysweep lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(StorageError):  # it is stale soon
            if self._lost is None and self._remote.read(LOCK_FILE) == self._content:
                self._remote.remove(LOCK_FILE)

    def _run(self) -> None:
        while self._lost is None and not self._ended.wait(BEAT_S):
            with suppress(StorageError):  # who takes over meanwhile is seen at the next beat
                found = self._remote.read(LOCK_FILE)
                if found is not None and found != self._content:
                    self._lost = StorageError(
                        f"the sweep {self._name!r} in {self._remote.uri} is run by {_holder_in(found)} by now, because "
                        f"this process could not say for {STALE_S} s that it lives"
                    )
                    return
                self._remote.write(LOCK_FILE, self._content)


def _remote_holder(remote: Remote, now: float) -> Holder | None:
    """Who holds the lock in a remote storage at a moment by its clock."""
    stamp, content = remote.stamp(LOCK_FILE), remote.read(LOCK_FILE)
    if stamp is None or content is None or now - stamp.seconds > STALE_S:
        return None
    holder = _holder_in(content)
    gone = holder.host == socket.gethostname() and holder.pid is not None and not process_lives(holder.pid)
    return None if gone else holder


def _holder_in(content: bytes) -> Holder:
    try:
        said = json.loads(content)
        return Holder(said["host"], said["pid"])
    except (ValueError, TypeError, KeyError):
        return Holder()


def _nothing_lost() -> None:
    """What the kernel keeps is not lost."""


def _acquired(path: Path) -> IO[str]:
    """The file of the lock, locked. One that its last holder has just removed is no lock any more."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = open(path, "a+", encoding="utf-8")  # noqa: SIM115  # open for as long as it is locked
        except FileNotFoundError:  # who made the folder before has given up, and taken it along
            continue
        try:
            if not _try(stream, fcntl.LOCK_EX):
                if (holder := local_holder(path.parent)) is not None:
                    raise _held(path.parent.name, holder)
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
