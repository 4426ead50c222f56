"""What a display knows of a sweep: counts, the best trial of every cell, and how long the rest may take."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raysweep.config.expansion import PlannedTrial
from raysweep.config.sections import SearchConfig
from raysweep.config.space import SearchSpace
from raysweep.results.schema import NUMERICAL, planned_columns

Row = Mapping[str, Any]
Kind = tuple[Any, ...]  # what decides how long a trial takes, more or less

KIND_COLUMNS = ("model", "recovery", "granularity", "epochs", "calibration_num_samples")


@dataclass
class Tally:
    """finished: earlier launches counted;  failed_before: in those, and to stay so
    failures: label and reason, of this launch;  to_stay: how many of all failures are numerical
    best: by the values of a cell;  heard: rows of this launch
    """

    search: SearchConfig
    cell_columns: tuple[str, ...]
    time_left: TimeLeft
    planned: int = 0
    finished: int = 0
    failed_before: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    to_stay: int = 0
    best: dict[tuple[Any, ...], Row] = field(default_factory=dict)
    dense: Row | None = None
    heard: int = 0

    @classmethod
    def of(cls, space: SearchSpace, earlier: Iterable[Row] = ()) -> Tally:
        """earlier: rows of trials that finished in earlier launches and will not run again."""
        planned, rows = space.typical(), list(earlier)
        tally = cls(space.search, _varying_cell(space, planned), TimeLeft(planned, rows))
        for row in rows:
            tally._note(row)
        return tally

    def begin(self, planned: int, finished: int, failed: int) -> None:
        self.planned, self.finished = planned, finished
        self.failed_before = self.to_stay = failed
        self.time_left.begin(planned, finished + failed)

    def row(self, row: Row) -> None:
        self.time_left.row(row)
        self.heard += 1
        if row.get("status") == "failed":
            self.failures.append((str(row.get("label")), str(row.get("error"))))
            self.to_stay += row.get("error_kind") == NUMERICAL
        else:
            self.finished += 1
            if row.get("status") != "stopped":  # whose metric is that of a model that is partly dense
                self._note(row)

    @property
    def done(self) -> int:
        return self.finished + self.failed

    @property
    def failed(self) -> int:
        return self.failed_before + len(self.failures)

    def _note(self, row: Row) -> None:
        """Keeps the row if it is the best of its cell so far; the dense one stands beside all cells."""
        if row.get("recovery") == "dense":
            self.dense = row
        elif row.get(self.search.metric) is not None:
            cell = tuple(row.get(name) for name in self.cell_columns)
            if cell not in self.best or self._better(row, self.best[cell]):
                self.best[cell] = row

    def _better(self, row: Row, known: Row) -> bool:
        sign = 1 if self.search.mode == "min" else -1
        return sign * float(row[self.search.metric]) < sign * float(known[self.search.metric])


class TimeLeft:
    """Expects of the trials that remain what trials of their kind have taken so far, at the pace so far.

    Trials in flight are slowed by one another, so the pace is the sum of their seconds by those of the clock.
    """

    def __init__(self, planned: list[PlannedTrial], earlier: Sequence[Row]) -> None:
        self._kinds = Counter(_kind(planned_columns(one)) for one in planned)
        self._kept = _kinds_kept(planned, earlier) if earlier else Counter()
        self._remaining: dict[Kind, float] = {}
        self._seconds: dict[Kind, list[float]] = defaultdict(list)
        for row in earlier:
            self._learn(row)
        self._worked = 0.0
        self._begun: float | None = None

    def begin(self, planned: int, finished: int, seconds_ago: float = 0.0) -> None:
        """finished: trials that will not run again; of unknown kinds, each kind has its share."""
        share = (planned - finished) / planned if planned else 0.0
        known = self._kept.total() == finished
        self._remaining = {
            kind: number - self._kept[kind] if known else number * share
            for kind, number in self._kinds.items()
        }
        self._begun = time.monotonic() - seconds_ago

    def row(self, row: Row) -> None:
        kind = _kind(row)
        if kind in self._remaining:
            self._remaining[kind] -= 1
        self._worked += self._learn(row)

    @property
    def elapsed(self) -> float:
        return 0.0 if self._begun is None else time.monotonic() - self._begun

    def seconds(self) -> float | None:
        """None until rows are there that say something about every kind of recovery that remains."""
        remaining = {kind: number for kind, number in self._remaining.items() if number > 0}
        expected = [(number, self._expected(kind)) for kind, number in remaining.items()]
        if not self._worked or any(seconds is None for _, seconds in expected):
            return None
        pace = min(1.0, self.elapsed / self._worked)  # above 1 it is the start of processes that took time
        return sum(number * (seconds or 0.0) for number, seconds in expected) * pace

    def _learn(self, row: Row) -> float:
        seconds = float(row.get("seconds_total") or 0.0)
        if seconds:
            self._seconds[_kind(row)].append(seconds)
        return seconds

    def _expected(self, kind: Kind) -> float | None:
        """The mean of a kind, or of all trials of its recovery."""
        recovery = KIND_COLUMNS.index("recovery")
        alike = self._seconds.get(kind) or [
            seconds
            for other, known in self._seconds.items()
            if other[recovery] == kind[recovery]
            for seconds in known
        ]
        return sum(alike) / len(alike) if alike else None


def _kind(row: Row) -> Kind:
    return tuple(row.get(name) for name in KIND_COLUMNS)


def _kinds_kept(planned: list[PlannedTrial], earlier: Sequence[Row]) -> Counter[Kind]:
    """The kinds of the earlier rows that belong to planned trials, as far as their labels tell."""
    from raysweep.analysis.rows import trial_label

    labels = {(one.model.path, trial_label(planned_columns(one))) for one in planned}
    return Counter(_kind(row) for row in earlier if (row.get("model"), row.get("label")) in labels)


def _varying_cell(space: SearchSpace, planned: list[PlannedTrial]) -> tuple[str, ...]:
    """The columns of a cell that tell its cells apart in this sweep."""
    columns = [planned_columns(one) for one in planned if not one.trial.is_dense]
    names = space.search.compare_within
    return tuple(name for name in names if len({row.get(name) for row in columns}) > 1)
