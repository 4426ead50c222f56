"""Ends a running sweep from elsewhere: a request in the sweep's folder, which the launching process looks for."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raysweep.errors import RaysweepError, StorageError, UsageError
from raysweep.results.lock import Holder, holder_of, local_holder
from raysweep.results.remote import Remote, remote_of

REQUEST_FILE = "stop.request"
LOOK_EVERY_S = 1.0


@contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """Within the context a request interrupts this process, as Ctrl-C does. Only its main thread can be interrupted; it
    also is where Ctrl-C is switched off, as in what shells start in the background."""
    request, remote, ended = folder / REQUEST_FILE, remote_of(folder), threading.Event()
    _take(request, remote)

    def look() -> None:
        while not ended.wait(LOOK_EVERY_S):
            if _take(request, remote):
                os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=look, name="raysweep stop", daemon=True)
    thread.start()
    try:
        with _interruptible():
            yield
    finally:
        ended.set()
        thread.join()
        _take(request, remote)


@contextmanager
def _interruptible() -> Iterator[None]:
    is_off = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not is_off or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _take(request: Path, remote: Remote | None) -> bool:
    """Whether there was a request, on this machine or in the storage. It is gone then."""
    there = request.exists()
    request.unlink(missing_ok=True)
    with suppress(StorageError):  # it is looked for again
        if remote is not None and remote.stamp(REQUEST_FILE) is not None:
            remote.remove(REQUEST_FILE)
            return True
    return there


def stop(folder: Path, timeout_s: float) -> Holder:
    """Asks the process that runs a sweep to end, and waits until it has; returns which one it was.

    Works from every host that sees the storage. Raises UsageError where nothing runs, RaysweepError where it still runs
    after `timeout_s`.
    """
    holder = holder_of(folder)
    if holder is None:
        raise UsageError(
            f"the sweep {folder.name!r} is not running", remedy="`raysweep status` shows which are."
        )
    remote = None if local_holder(folder) else remote_of(folder)
    if remote is None:
        (folder / REQUEST_FILE).touch()
    else:
        remote.write(REQUEST_FILE, b"stop")
    deadline = time.monotonic() + timeout_s
    while holder_of(folder) == holder:
        if time.monotonic() > deadline:
            raise RaysweepError(
                f"{holder} still runs the sweep {folder.name!r} {timeout_s:.0f} s after it was asked to end. "
                "Ask again, or end it by its number."
            )
        time.sleep(0.2 if remote is None else LOOK_EVERY_S)
    return holder
