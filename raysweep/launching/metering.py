"""A launch whose state can be watched as metrics: in Grafana, or wherever Prometheus is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from raysweep.config.sections import SearchConfig
from raysweep.launching.progress import Progress, Row

if TYPE_CHECKING:
    from raysweep.cluster.meter import SweepMeter


class Metered:
    """Passes a launch on to another display, and its numbers to a meter."""

    def __init__(
        self, progress: Progress, meter: SweepMeter, search: SearchConfig, earlier: Iterable[Row]
    ) -> None:
        """earlier: rows of trials that will not run again"""
        self._progress, self._meter, self._search = progress, meter, search
        self._planned = self._finished = self._failed = 0
        self._best: dict[str, float] = {}
        for row in earlier:
            self._note_best(row)

    def stage(self, text: str) -> None:
        self._progress.stage(text)

    def begin(self, planned: int, finished: int, failed: int, dashboard: str | None, others: int) -> None:
        self._planned, self._finished, self._failed = planned, finished, failed
        self._tell()
        self._progress.begin(planned, finished, failed, dashboard, others)

    def row(self, row: Row) -> None:
        if row.get("status") == "failed":
            self._failed += 1
        else:
            self._finished += 1
        self._tell()
        self._note_best(row)
        self._progress.row(row)

    def end(self) -> None:
        self._progress.end()

    def _tell(self) -> None:
        waiting = max(0, self._planned - self._finished - self._failed)
        self._meter.trials(finished=self._finished, failed=self._failed, waiting=waiting)

    def _note_best(self, row: Row) -> None:
        """The dense model stands beside all cells."""
        value = row.get(self._search.metric)
        if value is None or row.get("status") != "finished" or row.get("recovery") == "dense":
            return
        named = {name: row[name] for name in self._search.compare_within if row.get(name) is not None}
        cell = " ".join(f"{name}={value}" for name, value in named.items())
        better = min if self._search.mode == "min" else max
        self._best[cell] = better(value, self._best.get(cell, value))
        self._meter.best(cell, self._best[cell])
