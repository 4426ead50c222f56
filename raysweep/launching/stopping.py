"""Ends a running sweep from elsewhere: a request in the sweep's folder, which the launching process looks for."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raysweep.errors import RaysweepError, UsageError
from raysweep.results.lock import Holder, holder_of

REQUEST_FILE = "stop.request"
LOOK_EVERY_S = 1.0


@contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """Within the context a request interrupts this process, as Ctrl-C does. Only its main thread can be interrupted."""
    request, ended = folder / REQUEST_FILE, threading.Event()
    request.unlink(missing_ok=True)

    def look() -> None:
        while not ended.wait(LOOK_EVERY_S):
            if request.exists():
                request.unlink(missing_ok=True)
                os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=look, name="raysweep stop", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        request.unlink(missing_ok=True)


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
    (folder / REQUEST_FILE).touch()
    deadline = time.monotonic() + timeout_s
    while holder_of(folder) == holder:
        if time.monotonic() > deadline:
            raise RaysweepError(
                f"{holder} still runs the sweep {folder.name!r} {timeout_s:.0f} s after it was asked to end. "
                "Ask again, or end it by its number."
            )
        time.sleep(0.2)
    return holder
