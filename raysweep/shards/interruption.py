"""The first interruption lets what is in hand come to its end, so that it is kept; the next one does not wait."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FINISHING = "finishing what is in hand; once more ends it now"

Handler = Callable[[int, FrameType | None], None]

log = logging.getLogger(__name__)


@contextmanager
def finishing_first() -> Iterator[None]:
    """Within the context a first SIGINT or SIGTERM waits for its end; a second one is answered at once.

    Signals that nothing answers in this process end it as ever. Only the main thread can be interrupted.
    """
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def answer(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) > 1:
            answer(number, frame)
        log.warning(FINISHING)

    try:
        with _handled([number for number, handler in before.items() if callable(handler)], note):
            yield
    finally:
        if len(noted) == 1:
            answer(noted[0], None)


@contextmanager
def not_waiting_longer() -> Iterator[None]:
    """The context ends at once, and in silence, by a SIGINT or SIGTERM that comes within it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        with _handled(SIGNALS, interrupt):
            yield
    except KeyboardInterrupt:
        pass


@contextmanager
def _handled(numbers: Iterable[signal.Signals], handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
