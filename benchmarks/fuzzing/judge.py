"""Runs one command line in this process and judges its ending: status, messages, time, and what was written."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from fuzzing.site import Case
from raysweep.results.uris import cache_folder

OURS = "^(error: |Usage: |Error: Option )"  # the last two are typer's, for options that are none
TAKES_VALUE = ("--set", "--name", "--storage", "--sort", "--address")
COLORS = "\x1b\\[[0-9;]*m"
CLEARED = ("RAYSWEEP_STORAGE", "RAYSWEEP_DEBUG", "COLUMNS", "RAY_ADDRESS", "FORCE_COLOR", "NO_COLOR", "LINES")
UNFORESEEN = ("Traceback (most recent call last)", "This was not foreseen")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
)


class HangError(BaseException):
    """The command took longer than it may. No `except Exception` of it can swallow this."""


@dataclass
class Ending:
    """problem: what is wrong with how the command ended; None where nothing is"""

    status: int
    seconds: float
    out: str = ""
    err: str = ""
    problem: str | None = None


@dataclass
class Watch:
    """Every path that this process opens for writing, makes, moves or removes while `active`, by Python's own audit."""

    active: bool = False
    paths: set[str] = field(default_factory=set)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and isinstance(flags, int) and flags & WRITING:
                self._note(path)
        elif event in CHANGES:
            folder = arguments[-1] if isinstance(arguments[-1], int) and arguments[-1] >= 0 else None
            base = "" if folder is None or event == "os.chmod" else os.readlink(f"/proc/self/fd/{folder}")
            for path in arguments[:2]:
                if isinstance(path, str | bytes | os.PathLike):
                    self._note(os.path.join(base, os.fsdecode(path)))

    def _note(self, path: str | bytes) -> None:
        text = os.fsdecode(path)
        if not text.startswith("/dev/"):
            with suppress(ValueError):
                self.paths.add(os.path.abspath(text))


class WouldRun(BaseException):
    """All is checked and the launch would begin."""


class Judge:
    """Runs cases one after another. root: the folder below which all lies that commands may be tempted to change"""

    def __init__(self, root: Path) -> None:
        self.root, self.watch = root, Watch()
        sys.addaudithook(self.watch.hook)

    def run(self, case: Case, folder: Path, limit_s: float, really: bool = False) -> Ending:
        """folder: the current one of the command;  really: launches run, instead of ending where they would begin"""
        before, here = _tree(self.root), os.getcwd()
        with _environment(case.environment):
            cache = cache_folder()
        paths = list(sys.path)
        self.watch.paths.clear()
        begin = time.monotonic()
        os.chdir(folder)
        try:
            with _environment(case.environment), _launching(really), _limited(limit_s):
                ending = self._invoke(case)
        except HangError:
            ending = Ending(-1, 0.0, problem=f"hang: not ended after {limit_s:g} s")
        finally:
            os.chdir(here)
            sys.path[:] = paths
        ending.seconds = time.monotonic() - begin
        if ending.problem is None:
            ending.problem = self._wrong_ending(case, ending) if not really else _unforeseen(ending)
        if ending.problem is None:
            ending.problem = self._written(case, before, cache)
        return ending

    def _invoke(self, case: Case) -> Ending:
        from typer.testing import CliRunner

        from raysweep.cli.main import app

        self.watch.active = True
        try:
            result = CliRunner().invoke(app, case.arguments)
        except WouldRun:
            return Ending(0, 0.0, out="{}")
        finally:
            self.watch.active = False
        ending = Ending(result.exit_code, 0.0, result.stdout, result.stderr)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            ending.problem = f"raised {type(result.exception).__name__}: {str(result.exception)[:300]}"
        return ending

    def _wrong_ending(self, case: Case, ending: Ending) -> str | None:
        if problem := _unforeseen(ending):
            return problem
        if ending.status not in (0, 2):
            return f"status {ending.status}: {ending.err[-300:]}"
        if ending.status == 2 and ending.out:
            return f"refused, and printed on stdout: {ending.out[:200]}"
        if ending.status == 2 and not re.search(OURS, re.sub(COLORS, "", ending.err), re.MULTILINE):
            return f"refused without a message of ours: {ending.err[:300]!r}"
        if ending.status == 0 and _asks_for_json(case.arguments):
            return _wrong_json(ending.out)
        return None

    def _written(self, case: Case, before: Mapping[str, tuple[int, int]], cache: Path) -> str | None:
        """Nothing at all but where the case allows it, and what this machine keeps for later, in `cache`."""
        allowed = [str(cache)]
        if case.may_write is not None:
            allowed += [str(case.may_write), str(self.root / "home")]
        after = _tree(self.root)
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        wrong = [
            path
            for path in sorted(changed | self.watch.paths)
            if not any(path == place or path.startswith(place + os.sep) for place in allowed)
        ]
        return f"wrote {', '.join(wrong[:3])}" if wrong else None


def _unforeseen(ending: Ending) -> str | None:
    for words in UNFORESEEN:
        if words in ending.err or words in ending.out:
            return f"unforeseen: {ending.err[:400]}"
    return None


def _asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether `--json` is an option of the command, and not what another one takes, or beside a call for help."""
    values = {place + 1 for place, word in enumerate(arguments) if word in TAKES_VALUE}
    options = {word for place, word in enumerate(arguments) if place not in values}
    return "--json" in options and options.isdisjoint(("-h", "--help", "--version", "--"))


def _wrong_json(out: str) -> str | None:
    try:
        json.loads(out)
    except ValueError as error:
        return f"--json printed no JSON: {error}: {out[:100]!r}"
    return None


def _tree(root: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for folder, folders, files in os.walk(root):
        for name in files:
            path = os.path.join(folder, name)
            stat = os.lstat(path)
            found[path] = (stat.st_size, stat.st_mtime_ns)
        for name in folders:
            found[os.path.join(folder, name)] = (0, 0)
    return found


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """The variables that speak to commands: none but those of the case."""
    before = dict(os.environ)
    for name in CLEARED:
        os.environ.pop(name, None)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _launching(really: bool) -> Iterator[None]:
    """Within it, a launch ends where it would start Ray, or without Ray its trials."""
    if really:
        yield
        return
    from unittest.mock import patch

    def begin(*_: Any) -> None:
        raise WouldRun

    launch = "raysweep.launching.launch"
    with (
        patch(f"{launch}._in_hand", lambda folder: nullcontext(lambda: None)),  # which writes a lock
        patch(f"{launch}._run", begin),
        patch("raysweep.cluster.connect.connected", begin),
    ):
        yield
