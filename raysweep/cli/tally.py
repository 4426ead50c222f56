"""What a display knows of a sweep: counts, the best trial of every cell, and how long the rest may take."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raysweep.config.expansion import PlannedTrial
from raysweep.config.sections import SearchConfig
from raysweep.config.space import SearchSpace

Row = Mapping[str, Any]
Kind = tuple[str, str | None]  # recovery and granularity: what decides how long a trial takes


@dataclass
class Tally:
    """finished: earlier launches counted;  failures: label and reason;  best: by the values of a cell"""

    search: SearchConfig
    cell_columns: tuple[str, ...]
    kinds: Counter[Kind]
    planned: int = 0
    finished: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    best: dict[tuple[Any, ...], Row] = field(default_factory=dict)
    dense: Row | None = None
    _work: dict[Kind, list[float]] = field(default_factory=lambda: defaultdict(list))
    _begun: float | None = None

    @classmethod
    def of(cls, space: SearchSpace, earlier: Iterable[Row] = ()) -> Tally:
        """earlier: rows of finished trials of earlier launches, which will not run again."""
        planned = space.expand()
        tally = cls(
            space.search,
            _varying_cell(space, planned),
            Counter(kind_of(p.trial.model_dump()) for p in planned),
        )
        for row in earlier:
            tally._note(row)
        return tally

    def begin(self, planned: int, finished: int) -> None:
        self.planned, self.finished = planned, finished
        self._begun = time.monotonic()

    def row(self, row: Row) -> None:
        if row.get("status") == "failed":
            self.failures.append((str(row.get("label")), str(row.get("error") or "its process ended")))
            return
        self.finished += 1
        self._work[kind_of(row)].append(float(row.get("seconds_total") or 0.0))
        self._note(row)

    @property
    def done(self) -> int:
        return self.finished + len(self.failures)

    @property
    def elapsed(self) -> float:
        return 0.0 if self._begun is None else time.monotonic() - self._begun

    def seconds_left(self) -> float | None:
        """From the rows of this launch: None until one of every kind of recovery is there."""
        done = sum(sum(seconds) for seconds in self._work.values())
        if self.done >= self.planned or not done:
            return 0.0 if self.planned and self.done >= self.planned else None
        whole = {kind: self._expected(kind) for kind in self.kinds}
        if any(seconds is None for seconds in whole.values()):
            return None
        total = sum(number * float(whole[kind] or 0.0) for kind, number in self.kinds.items())
        share = (self.planned - self.done) / self.planned
        left = (
            max(total - done, 0.0) if self.finished == sum(map(len, self._work.values())) else total * share
        )
        return left * self.elapsed / done

    def _expected(self, kind: Kind) -> float | None:
        """Mean seconds of a kind, or of its recovery at other granularities."""
        alike = self._work.get(kind) or [
            seconds for other, rows in self._work.items() if other[0] == kind[0] for seconds in rows
        ]
        if not alike and kind[0] == "dense":
            return 0.0
        return sum(alike) / len(alike) if alike else None

    def _note(self, row: Row) -> None:
        if row.get("recovery") == "dense":
            self.dense = row
            return
        value = row.get(self.search.metric)
        if value is None:
            return
        cell = tuple(row.get(name) for name in self.cell_columns)
        known = self.best.get(cell)
        if known is None or self._better(float(value), float(known[self.search.metric])):
            self.best[cell] = row

    def _better(self, value: float, than: float) -> bool:
        return value < than if self.search.mode == "min" else value > than


def kind_of(row: Row) -> Kind:
    return str(row.get("recovery")), row.get("granularity")


def _varying_cell(space: SearchSpace, planned: list[PlannedTrial]) -> tuple[str, ...]:
    """The columns of a cell that tell its cells apart in this sweep."""
    from raysweep.results.schema import planned_columns

    columns = [planned_columns(one) for one in planned if not one.trial.is_dense]
    names = space.search.compare_within
    return tuple(name for name in names if len({row.get(name) for row in columns}) > 1)
