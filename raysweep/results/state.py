"""What the launching process says about a sweep while it runs: one small JSON file beside its rows."""

from __future__ import annotations

import json
import math
import os
import socket
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raysweep.errors import RaysweepError
from raysweep.results.atomic import process_lives, write_atomically
from raysweep.results.folders import STATE_FILE

STATES = ("running", "finished", "failed", "interrupted")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class ShardState:
    """What one shard has done since it was loaded, and in the last minute; rates are None until two looks are there.

    busy: share of the time;  stored_bytes: of the dense activations that it keeps
    doing: trial and call in hand, empty where it waits
    """

    units: int
    stored_bytes: int
    doing: str
    busy: float | None = None
    units_per_second: float | None = None
    trained_tokens_per_second: float | None = None
    evaluated_tokens_per_second: float | None = None

    @classmethod
    def of(cls, stored: Any) -> ShardState:
        """Raises ValueError, TypeError or KeyError for what no launch has written."""
        state = cls(**{each.name: stored[each.name] for each in fields(cls)})
        rates = [getattr(state, each.name) for each in fields(cls)[3:]]
        if any(type(count) is not int or count < 0 for count in (state.units, state.stored_bytes)):
            raise ValueError("a count that is none")
        if any(rate is not None and not math.isfinite(float(rate)) for rate in rates):
            raise ValueError("a rate that is none")
        if not isinstance(state.doing, str):
            raise ValueError("a text that is none")
        return state


@dataclass(frozen=True)
class SweepState:
    """The state of one sweep. Moments are ISO texts in UTC.

    planned: trials of the sweep; finished, failed: of them, earlier launches counted
    others: finished rows of trials that are not in the space of the last launch
    running: trials in flight;  activity: of its shards while they run, by shard
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
    activity: tuple[ShardState, ...] = ()

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
            activity = tuple(map(ShardState.of, known.pop("activity", ())))
            state = cls(**known, activity=activity)
            state._check()
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
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
        return self.interrupted() if self.state == "running" and gone else self

    def interrupted(self) -> SweepState:
        """The same of a launch that is gone."""
        return replace(self, state="interrupted", running=0, activity=())
