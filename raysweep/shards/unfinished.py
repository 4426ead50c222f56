"""Recovered units on storage until their trial has its row: no unit is lost with the process that recovered it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from raysweep.errors import RaysweepError, first_line
from raysweep.model.block_files import read_tensors, write_tensors

BYTES_PER_S = 200e6  # that a file takes beside its opening; assumption: a network file system
FREE_SHARE = 0.05  # of the room on the storage, that one unit may take
PATIENCE = 0.1  # of the time that a unit took, for which the shard waits for it to be written

log = logging.getLogger(__name__)


class UnfinishedUnits:
    """Writes units, large ones while the shard goes on with the next one, and reads those that others have left.

    A unit is written where recovering it again would take longer. How long files take is learned from those that were
    written, the first one always.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "unfinished units")
        self._writing: Future[None] | None = None
        self._file_s = 0.0

    def leave(
        self, file: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any], seconds: float
    ) -> bool:
        """Has a unit written that took so many seconds; returns whether it is worth it.

        about: what JSON can hold, which `take` gives back
        """
        nbytes = sum(tensor.nbytes for tensor in weights.values())
        if seconds < self._file_s + nbytes / BYTES_PER_S:
            return False
        self.settle()
        # Copied here, because what comes next for the trial may change these tensors in place.
        copies = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        self._writing = self._thread.submit(self._write, file, copies, dict(about), nbytes)
        wait([self._writing], PATIENCE * seconds)
        return True

    def take(self, file: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Weights of a unit by name, and what was written about it; None where it is not there, or not as a whole."""
        if not file.exists():
            return None
        try:
            return read_tensors(file)
        except RaysweepError as error:
            log.warning("recovered anew: %s", first_line(error))
            return None

    def settle(self) -> None:
        """Waits until everything is written, so that nothing appears where a trial has cleaned up."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, file: Path, weights: Mapping[str, Tensor], about: dict[str, Any], nbytes: int) -> None:
        start = perf_counter()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if nbytes > FREE_SHARE * shutil.disk_usage(file.parent).free:
                return
            write_tensors(file, weights, about)
        except Exception as error:  # whatever it is, it only costs what recovering the unit again does
            log.warning("%s is not kept for a later launch: %s", file.name, first_line(error))
        own = max(0.0, perf_counter() - start - nbytes / BYTES_PER_S)
        self._file_s = own if not self._file_s else 0.8 * self._file_s + 0.2 * own
