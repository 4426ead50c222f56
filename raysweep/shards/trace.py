"""What every shard did and when, as Chrome and Perfetto read it. No torch."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysweep.results.atomic import write_atomically

LAUNCH = "launch"  # the line of the launching process
MICROSECONDS = 1e6


@dataclass(frozen=True)
class Span:
    """label: of the call, as the dashboard shows it (`<trial_id>: recover 3.attention`);  start: seconds since 1970"""

    label: str
    start: float
    seconds: float


@dataclass
class Trace:
    """Spans in the order in which they ended; keeps none unless it is switched on."""

    on: bool = False
    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def span(self, label: str) -> Iterator[None]:
        """Notes how long the context takes, also when it raises."""
        if not self.on:
            yield
            return
        start, clock = time.time(), time.perf_counter()
        try:
            yield
        finally:
            self.spans.append(Span(label, start, time.perf_counter() - clock))


def write_trace(file: Path, lines: Mapping[str, Sequence[Span]], labels: Mapping[str, str]) -> None:
    """Writes a trace in Chrome's format, which Perfetto opens as well.

    lines: spans by what did them (`shard 0`, `launch`);  labels: of trials, by trial_id
    """
    events: list[dict[str, Any]] = []
    for number, (line, spans) in enumerate(lines.items()):
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": line}})
        events += [_event(number, span, labels) for span in spans]
    write_atomically(file, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())


def _event(number: int, span: Span, labels: Mapping[str, str]) -> dict[str, Any]:
    trial, _, call = span.label.rpartition(": ")
    trial = trial.rpartition("@")[2]  # what a trial does for all that share it
    return {
        "ph": "X",
        "name": call,
        "cat": call.split(" ")[0],
        "pid": number,
        "tid": 0,
        "ts": span.start * MICROSECONDS,
        "dur": span.seconds * MICROSECONDS,
        "args": {"trial": labels.get(trial, trial)} if trial else {},
    }
