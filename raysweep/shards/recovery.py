"""The recovery of one trial: portions of the model, each pruned and then recovered unit by unit. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from raysweep.config.trial import Trial
from raysweep.shards.across import recover_across
from raysweep.shards.calls import Calls
from raysweep.shards.group_info import UnitSpan
from raysweep.shards.streams import Stream, kept_texts


class Recovery:
    """The units of a trial, portion by portion: each is pruned, then recovered.

    Units that do not depend on one another are recovered in all shards at once. Others go in the order of the model,
    behind a stream that passes through what the units before have become.
    """

    def __init__(self, calls: Calls, trial: Trial, unfinished: Path | None = None) -> None:
        """unfinished: where units are kept until the trial is finished, and taken over from"""
        self.calls, self.trial, self.info = calls, trial, calls.info
        self._unfinished = unfinished
        self.rows: list[dict[str, Any]] = []
        self._portions = _portions(self.info.units[str(trial.granularity)])
        if not trial.is_sequential:
            self._portions = _spread(self._portions)
        self._begun = 0
        self._stream: Stream | None = None

    @property
    def done(self) -> float:
        """The fraction of the blocks that are pruned and recovered."""
        blocks = sum(portion[0].stop - portion[0].start for portion in self._portions[: self._begun])
        return blocks / self.info.blocks

    @property
    def remains(self) -> bool:
        return self._begun < len(self._portions)

    def go_on(self, fraction: float) -> bool:
        """Prunes and recovers up to that fraction of the portions; returns whether there was something to do."""
        until = max(1, math.ceil(fraction * len(self._portions) - 1e-9))
        portions, self._begun = self._portions[self._begun : until], max(until, self._begun)
        if not portions:
            return False
        units = sorted((unit for portion in portions for unit in portion), key=lambda unit: unit.start)
        if not self.trial.is_sequential:
            self._at_once(units)
            return True
        if self.trial.statistics_stream != "recovered":  # else each unit prunes its blocks itself
            blocks = (index for portion in portions for index in range(portion[0].start, portion[0].stop))
            prune_blocks(self.calls, self.calls.name, self.trial, sorted(blocks))
        self._in_order(units)
        return True

    def _at_once(self, units: Sequence[UnitSpan]) -> None:
        """A shard prunes a block just before it recovers the first unit of it: a block may have to come into hand for
        either. Calls that wait at a shard may overtake one another, so that this is no call of its own."""
        calls: list[list[Any]] = [[] for _ in range(self.info.shards)]
        across = [unit for unit in units if len(self.info.shards_of(unit)) > 1]
        for unit in units:
            if unit not in across:
                arguments = (self.calls.name, self.trial, unit.name, self._unfinished)
                calls[self.info.shard_of(unit.start)].append(("recover", arguments, f"recover {unit.name}"))
        rows = self.calls.interleaved(calls)
        blocks = sorted({index for unit in across for index in range(unit.start, unit.stop)})
        prune_blocks(self.calls, self.calls.name, self.trial, blocks)
        rows += [recover_across(self.calls, self.trial, unit, self._unfinished) for unit in across]
        self._take(rows)

    def _in_order(self, units: Sequence[UnitSpan]) -> None:
        stream = self._stream or Stream.enter(self.calls, self.calls.name, kept_texts(self.calls))
        self._stream = stream
        for unit in units:
            stream.reach(self.info.shard_of(unit.start))
            if len(self.info.shards_of(unit)) == 1:
                arguments = (self.calls.name, self.trial, unit.name, self._unfinished)
                self._take(
                    [self.calls.ask(stream.shard, "recover", *arguments, label=f"recover {unit.name}")]
                )
                continue
            if self.trial.statistics_stream == "recovered":
                ahead = stream.fork(f"ahead@{self.calls.name}")
                ahead.prune(self.calls.name, self.trial, unit.start, unit.stop)
                ahead.drop()
            self._take([recover_across(self.calls, self.trial, unit, self._unfinished)])
            stream.has_moved(self.info.shard_of(unit.stop - 1))

    def _take(self, rows: Iterable[dict[str, Any] | None]) -> None:
        """Keeps rows in the order of the model."""
        self.rows = sorted(
            [*self.rows, *(row for row in rows if row is not None)], key=lambda row: row["block"]
        )


def prune_blocks(calls: Calls, name: str, trial: Trial, blocks: Iterable[int]) -> list[dict[str, Any]]:
    """Prunes blocks under `name`, in all shards at once; returns the rows of their linears in order."""
    by_shard: list[list[Any]] = [[] for _ in range(calls.info.shards)]
    for index in blocks:
        by_shard[calls.info.shard_of(index)].append(("prune", (name, trial, index), f"prune {index}"))
    return [row for rows in calls.interleaved(by_shard) for row in rows]


def _portions(units: Sequence[UnitSpan]) -> list[list[UnitSpan]]:
    """Units that lie in the same blocks together, in the order of the model."""
    portions: dict[tuple[int, int], list[UnitSpan]] = {}
    for unit in units:
        portions.setdefault((unit.start, unit.stop), []).append(unit)
    return list(portions.values())


def _spread(portions: list[list[UnitSpan]]) -> list[list[UnitSpan]]:
    """So ordered that every beginning is spread over the model: the middle, the quarters, the eighths, and so on.

    The middle comes first because the ends of a model are its least typical blocks.
    """
    order: dict[int, None] = {}
    number = 0
    while len(order) < len(portions):
        number += 1
        order.setdefault(int(_van_der_corput(number) * len(portions)))
    return [portions[place] for place in order]


def _van_der_corput(number: int) -> float:
    """1/2, 1/4, 3/4, 1/8, 5/8, ...: the binary digits of the number mirrored at the point."""
    value, digit = 0.0, 0.5
    while number:
        value, digit, number = value + digit * (number & 1), digit / 2, number >> 1
    return value
