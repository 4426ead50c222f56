"""Recovered units on storage until their trial has its row: no unit is lost with the process that recovered it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

from torch import Tensor

from raysweep.errors import RaysweepError, first_line
from raysweep.model.block_files import read_tensors, write_tensors
from raysweep.results.folders import across_file, part_file, unit_file
from raysweep.shards.memory import WRITING_BYTES_S

FREE_SHARE = 0.05  # of the room on the storage, that one file may take
# A shard waits for a unit to be written for this share of the time that the unit took, or so long if that is less.
PATIENCE, PATIENCE_S = 0.1, 0.05
FORGETTING = 0.9  # of what a file costs, each time that this was too much

log = logging.getLogger(__name__)

Found = tuple[dict[str, Tensor], dict[str, Any]]
"""Weights by full name, and what was written about their unit."""


class UnfinishedUnits:
    """Writes units, large ones while the shard goes on with the next one, and reads those that others have left.

    A unit is written where recovering it again would cost more, unless units come faster than the storage takes them.
    What files cost and take is learned from those that were written.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "unfinished units")
        self._writing: tuple[str, Future[bool]] | None = None
        self._cost_s = self._wait_s = 0.0  # of a file: on a core, and by the clock

    def leave(
        self, owner: str, file: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any], seconds: float
    ) -> Future[bool] | None:
        """Has a unit, or a part of one, written that took so many seconds, if that is worth it; returns what will say
        whether it is there, None where it is not worth it.

        owner: the trial;  about: what JSON can hold, which `take` gives back
        """
        nbytes = sum(tensor.nbytes for tensor in weights.values())
        if seconds < self._cost_s + nbytes / WRITING_BYTES_S:
            self._cost_s *= FORGETTING  # the file that it was learned from may have been an odd one
            return None
        if self._is_writing and seconds < self._wait_s + nbytes / WRITING_BYTES_S:
            return None
        self.settle()
        # Copied here, because what comes next for the trial may change these tensors in place.
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
        future = self._thread.submit(self._write, file, copies, dict(about), nbytes)
        self._writing = owner, future
        wait([future], max(PATIENCE * seconds, min(PATIENCE_S, seconds)))
        return future

    def leave_part(
        self, owner: str, folder: Path, unit: str, parts: Mapping[int, Mapping[str, Tensor]], seconds: float
    ) -> bool:
        """The same for the blocks of a unit that reaches over several shards; returns once they are written, and
        whether all are."""
        for block, weights in parts.items():
            written = self.leave(owner, part_file(folder, unit, block), weights, {}, seconds / len(parts))
            if written is None or not written.result():
                return False
        return True

    def take(self, folder: Path, unit: str, blocks: Mapping[int, str]) -> Found | None:
        """What lies there of a unit, written by one shard or by several; None where it is not there as a whole.

        blocks: those that are wanted, with the prefix of their names
        """
        try:
            if unit_file(folder, unit).exists():
                weights, about = read_tensors(unit_file(folder, unit))
                return _of_blocks(weights, blocks.values()), about
            if across_file(folder, unit).exists():
                about = json.loads(across_file(folder, unit).read_text(encoding="utf-8"))
                parts = [read_tensors(part_file(folder, unit, block))[0] for block in blocks]
                return {name: tensor for part in parts for name, tensor in part.items()}, about
        except (OSError, ValueError, RaysweepError) as error:
            log.warning("recovered anew: %s", first_line(error))
        return None

    def settle(self, owner: str | None = None) -> None:
        """Waits until what is left, of a trial or of all, is written, so that nothing appears where a trial has cleaned
        up."""
        if self._writing is not None and owner in (None, self._writing[0]):
            _, future = self._writing
            self._writing = None
            wait([future])

    @property
    def _is_writing(self) -> bool:
        return self._writing is not None and not self._writing[1].done()

    def _write(self, file: Path, weights: Mapping[str, Tensor], about: dict[str, Any], nbytes: int) -> bool:
        start, begin = perf_counter(), thread_time()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if nbytes > FREE_SHARE * shutil.disk_usage(file.parent).free:
                return False
            write_tensors(file, weights, about, survives_crashes=False)
        except Exception as error:  # whatever it is, it only costs what recovering the unit again does
            log.warning("%s is not kept for a later launch: %s", file.name, first_line(error))
            return False
        self._cost_s = _learned(self._cost_s, thread_time() - begin - nbytes / WRITING_BYTES_S)
        self._wait_s = _learned(self._wait_s, perf_counter() - start - nbytes / WRITING_BYTES_S)
        return True


def _learned(known: float, seconds: float) -> float:
    seconds = max(0.0, seconds)
    return seconds if not known else 0.8 * known + 0.2 * seconds


def _of_blocks(weights: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, Tensor]:
    starts = tuple(f"{prefix}." for prefix in prefixes)
    return {name: tensor for name, tensor in weights.items() if name.startswith(starts)}
