"""A launch that notes what it and its shards do when, and leaves that as a file for Perfetto or Chrome."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from raysweep.launching.progress import Progress, Row
from raysweep.results.folders import TRACE_FILE
from raysweep.shards.trace import LAUNCH, Span, write_trace


class Tracing:
    """Notes the stages of a launch on their way to another display, and takes what the shards have noted."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lines: dict[str, list[Span]] = defaultdict(list)
        self._labels: dict[str, str] = {}
        self._stage: tuple[str, float] | None = None

    def add_shards(self, spans: Sequence[Sequence[Span]]) -> None:
        """spans: by shard, of a group that is about to end"""
        for shard, mine in enumerate(spans):
            self._lines[f"shard {shard}"] += mine

    def write(self, folder: Path) -> None:
        """Leaves the trace in the folder of the sweep."""
        self._end_stage()
        launch = {LAUNCH: self._lines.pop(LAUNCH, [])}
        write_trace(folder / TRACE_FILE, launch | self._lines, self._labels)

    def stage(self, text: str) -> None:
        self._end_stage()
        self._stage = (text, time.time())
        self._progress.stage(text)

    def begin(self, planned: int, finished: int, failed: int, dashboard: str | None, others: int) -> None:
        self._end_stage()
        self._stage = ("trials", time.time())
        self._progress.begin(planned, finished, failed, dashboard, others)

    def row(self, row: Row) -> None:
        if "trial_id" in row:
            self._labels[row["trial_id"]] = row["label"]
        self._progress.row(row)

    def end(self) -> None:
        self._end_stage()
        self._progress.end()

    def _end_stage(self) -> None:
        if self._stage is not None:
            text, start = self._stage
            self._lines[LAUNCH].append(Span(text, start, time.time() - start))
            self._stage = None
