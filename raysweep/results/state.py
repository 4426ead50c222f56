"""What the launching process says about a sweep while it runs: one small JSON file beside its rows."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from raysweep.errors import RaysweepError
from raysweep.results.folders import STATE_FILE
from raysweep.results.writer import process_lives, write_atomically

STATES = ("running", "finished", "failed", "interrupted")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class SweepState:
    """The state of one sweep. Moments are ISO texts in UTC.

    planned: trials of the sweep; finished, failed: of them, earlier launches counted
    others: finished rows of trials that are not in the space of the last launch
    running: trials in flight
    """

    name: str
    state: str = "running"
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    started_at: str = field(default_factory=_now)
    updated_at: str = field(default_factory=_now)
    planned: int = 0
    finished: int = 0
    failed: int = 0
    others: int = 0
    running: int = 0
    shards: int | None = None
    dashboard: str | None = None

    def write(self, folder: Path) -> SweepState:
        """Stores the state in the sweep's folder with a fresh `updated_at`; returns what was stored."""
        if self.state not in STATES:
            raise RaysweepError(f"state {self.state!r} is not one of {', '.join(STATES)}")
        current = replace(self, updated_at=_now())
        write_atomically(folder / STATE_FILE, (json.dumps(asdict(current), indent=1) + "\n").encode())
        return current

    @classmethod
    def read(cls, folder: Path) -> SweepState | None:
        """The stored state, or None. A running one whose process is gone from this host is interrupted."""
        try:
            stored = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            known = {name: stored[name] for name in (f.name for f in fields(cls)) if name in stored}
            state = cls(**known)
            state._check()
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        return state.settled()

    def _check(self) -> None:
        """Raises ValueError for what no launch has written: the file may be damaged, or another program's."""
        numbers = [self.pid, self.planned, self.finished, self.failed, self.others, self.running]
        numbers += [] if self.shards is None else [self.shards]
        texts = [self.name, self.host] + ([] if self.dashboard is None else [self.dashboard])
        if self.state not in STATES or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a state or a number that is none")
        moments = [datetime.fromisoformat(moment) for moment in (self.started_at, self.updated_at)]
        if not all(isinstance(text, str) for text in texts) or not all(moment.tzinfo for moment in moments):
            raise ValueError("a text or a moment that is none")

    def settled(self) -> SweepState:
        """The same, or interrupted when its process can be seen to be gone."""
        gone = self.host == socket.gethostname() and not process_lives(self.pid)
        return replace(self, state="interrupted", running=0) if self.state == "running" and gone else self
