"""How a command ends: its exit status for every kind of ending, and one clean way out for signals."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec

import typer

from raysweep.cli.console import say, say_error
from raysweep.errors import RaysweepError

P = ParamSpec("P")

FAILED = 1
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
DEBUG_VARIABLE = "RAYSWEEP_DEBUG"
PATIENCE = 3  # signals during an import, after which it is not waited for
AGAIN_S = 0.1  # after which a signal is sent again that came at the wrong moment


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. Ends the process by the same clean-up as Ctrl-C."""


def guarded(command: Callable[P, int | None]) -> Callable[P, None]:
    """A command whose result is its exit status, and whose errors are one message instead of a traceback."""

    @functools.wraps(command)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        raise typer.Exit(_status(lambda: command(*arguments, **options)))

    return run


def _status(command: Callable[[], int | None]) -> int:
    try:
        return command() or 0
    except RaysweepError as error:
        show_traceback()
        say_error(str(error))
        return error.exit_status
    except KeyboardInterrupt as interruption:
        show_traceback()
        return interruption_status(interruption)
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:  # the last resort: a bug, or a library's error that nobody foresaw
        if not show_traceback():
            first_line = (str(error).strip() or "no message").splitlines()[0]
            say_error(f"{type(error).__name__}: {first_line}")
            say(
                "  This was not foreseen. `raysweep --debug ...` or RAYSWEEP_DEBUG=1 shows where it happened."
            )
        return FAILED


def interruption_status(interruption: KeyboardInterrupt) -> int:
    return TERMINATED if isinstance(interruption, Terminated) else INTERRUPTED


def debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def show_traceback() -> bool:
    """The traceback of the error in hand, if it was asked for."""
    if debugging():
        say(traceback.format_exc().rstrip())
    return debugging()


@contextmanager
def clean_interruptions() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the context as KeyboardInterrupt and Terminated, whatever Ray makes of them.

    The first signal raises; a second one, during the clean-up, only says so; later ones raise again. None is raised in
    the middle of an import, which would leave a lock behind for ever, nor lost where Python swallows what is raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    later = _Later()

    def handle(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame) and later.takes(number):
            return
        received.append(number)
        if len(received) == 2:
            say("still cleaning up; once more ends it at once and may leave processes behind")
            return
        raise _interruption(number)

    def swallowed(what: sys.UnraisableHookArgs) -> None:
        if isinstance(what.exc_value, KeyboardInterrupt) and received:
            later.send(received.pop())  # raised in a finalizer or the like, from where it goes nowhere
        else:
            unraisable(what)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    unraisable, sys.unraisablehook = sys.unraisablehook, swallowed
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM and not received:
            received.append(signal.SIGTERM)  # Ray's own answer, while it starts
        if (
            received
        ):  # Ray and Tune turn one interruption into another, or into errors of what was interrupted
            raise _interruption(received[0]) from error
        raise
    else:
        if received:
            raise _interruption(received[0])
    finally:
        later.forget()
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class _Later:
    """Sends a signal again a moment later, one at a time."""

    def __init__(self) -> None:
        self._pressed, self._again = 0, False
        self._timer: threading.Timer | None = None

    def takes(self, number: int) -> bool:
        """Whether a signal in the middle of an import can wait: not the third one, for an import may not end."""
        if self._again:
            self._again = False
        else:  # somebody has pressed, and not this
            self._pressed += 1
            if self._pressed == 1:
                say("ends when what it loads is there")
        if self._pressed >= PATIENCE:
            return False
        if self._timer is None:
            self.send(number)
        return True

    def send(self, number: int) -> None:
        self._timer = threading.Timer(AGAIN_S, self._send, (number,))
        self._timer.daemon = True
        self._timer.start()

    def forget(self) -> None:
        """Sends nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _send(self, number: int) -> None:
        self._timer, self._again = None, True
        os.kill(os.getpid(), number)


def _interruption(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
