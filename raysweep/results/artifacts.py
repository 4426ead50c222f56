"""Kept trials: whose weights stay on storage, where, and which of them go again. No torch.

`artifacts/<trial_id>/` holds the masks and weights of every block (`block-<i>.safetensors`), of a model that was
retrained as a whole also what lies outside of the blocks, and `kept.json`, which is written last: without it the rest
is nothing.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from raysweep.config.sections import CELL_COLUMNS, METRICS, SearchConfig
from raysweep.fingerprint import fingerprint, is_identity
from raysweep.results.atomic import write_atomically
from raysweep.results.folders import ARTIFACTS, TRIALS, block_file

MARKER = "kept.json"
NONE, BEST, ALL = "none", "best", "all"
COMPARABLE = (
    "model_hash",
    "dtype",
    "validation_hash",
)  # beside the cell: of rows of other launches they may differ

Row = Mapping[str, Any]


def artifact_folder(sweep: Path, trial_id: str) -> Path:
    """Where the weights of a kept trial lie."""
    return sweep / ARTIFACTS / trial_id


@dataclass(frozen=True)
class Kept:
    """What is said of a kept trial: whose weights these are, and what tells its cell and how good it is.

    files: names of the files with its weights
    waits: whether they are there for its tasks alone
    """

    trial_id: str
    recovery_id: str
    files: tuple[str, ...]
    row: dict[str, Any]
    waits: bool = False

    @classmethod
    def of(cls, row: Row, folder: Path, waits: bool = False) -> Kept:
        """folder: that holds all its files"""
        told = {
            name: row[name] for name in (*CELL_COLUMNS, *COMPARABLE, *METRICS) if row.get(name) is not None
        }
        files = sorted(path.name for path in folder.glob(block_file(folder, "*").name))
        return cls(row["trial_id"], row["recovery_id"], tuple(files), told, waits)

    def missing(self, folder: Path) -> list[str]:
        """Of its files those that are not in the folder (any more)."""
        return [name for name in self.files if not (folder / name).exists()]

    def write(self, folder: Path) -> None:
        """Makes what lies in the folder a kept trial. Raises StorageError."""
        said = asdict(self)
        if not self.waits:
            del said["waits"]
        write_atomically(folder / MARKER, json.dumps(said, allow_nan=False).encode())

    @classmethod
    def read(cls, folder: Path) -> Kept | None:
        """The kept trial in a folder; None where there is none, or not all of it."""
        try:
            said = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            known = {one.name for one in fields(cls)}  # other versions may say more
            kept = cls(**{name: said[name] for name in known & said.keys()} | {"files": tuple(said["files"])})
            texts = (kept.trial_id, kept.recovery_id, *kept.files)
            fits = all(isinstance(text, str) for text in texts) and isinstance(kept.row, dict)
            fits = fits and isinstance(kept.waits, bool)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return kept if fits and kept.trial_id == folder.name else None


def kept_trials(sweep: Path) -> Iterator[Kept]:
    """The kept trials of a sweep, by trial_id; what is not complete is passed over."""
    for folder in sorted((sweep / ARTIFACTS).glob("*")):
        if (kept := Kept.read(folder)) is not None:
            yield kept


def remove_artifact(folder: Path) -> None:
    """Removes what a kept trial has on storage; whatever ends that, nothing that looks whole is left."""
    with suppress(OSError):
        (folder / MARKER).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished(sweep: Path, finished: Collection[str]) -> None:
    """Removes what is not complete, and what belongs to no finished trial: its process ended before it had its row.

    Nothing of the sweep may run. finished: identities of the trials that have such rows
    """
    for folder in (sweep / ARTIFACTS).glob("*"):
        if is_identity(folder.name) and (folder.name not in finished or Kept.read(folder) is None):
            remove_artifact(folder)
    with suppress(OSError):
        (sweep / ARTIFACTS).rmdir()


@dataclass(frozen=True)
class Keeping:
    """Which finished trials are kept: none, the best one of every cell, or all.

    metric, mode, within: what best means, and the columns that are equal in a cell, as of `search`
    best: by cell the best value of the rows that were there before, whether their trials are kept or not
    until_tasks: whether what is kept goes once its tasks are measured
    """

    keep: str = NONE
    metric: str = ""
    mode: str = "min"
    within: tuple[str, ...] = ()
    best: Mapping[str, float] = field(default_factory=dict)
    until_tasks: bool = False

    @classmethod
    def of(cls, keep: str, search: SearchConfig, rows: Iterable[Row] = ()) -> Keeping:
        """rows: that are there"""
        keeping = cls(keep, search.metric, search.mode, search.compare_within)
        best: dict[str, float] = {}
        for row in rows if keep == BEST else ():
            value = row.get(search.metric)
            if value is None or row.get("status") != "finished" or row.get("recovery") == "dense":
                continue
            cell = keeping.cell(row)
            if cell not in best or keeping._is_better(value, best[cell]):
                best[cell] = value
        return cls(keep, search.metric, search.mode, search.compare_within, best)

    def cell(self, row: Row) -> str:
        """Equal for trials that may be compared: of one cell of the space, and measured alike."""
        return fingerprint([row.get(name) for name in (*self.within, *COMPARABLE)])

    def wants(self, sweep: Path, row: Row) -> bool:
        """Whether a trial is to be kept, as far as it can be known: `best` one that is better than every other one of
        its cell that has a row.

        row: what is known of it, its trial_id and its metrics among that
        """
        if self.keep != BEST:
            return self.keep == ALL
        value = row.get(self.metric)
        if value is None or not math.isfinite(value):
            return False
        cell = self.cell(row)
        others = [self.best.get(cell)]
        others += [
            kept.row.get(self.metric)
            for kept in kept_trials(sweep)
            if kept.trial_id != row["trial_id"] and self.cell(kept.row) == cell and _has_row(sweep, kept)
        ]
        return all(other is None or self._is_better(value, other) for other in others)

    def remove_superseded(self, sweep: Path, finished: Collection[str], waiting_too: bool = False) -> None:
        """Leaves of the kept trials of every cell the best one.

        finished: identities of trials that have rows; others are still at work, and nothing is removed for them
        waiting_too: weights that wait for tasks need wait no more; else they stay, whoever asked for those tasks
        """
        if self.keep != BEST:
            return
        cells: dict[str, list[Kept]] = defaultdict(list)
        for kept in kept_trials(sweep):
            may_go = kept.trial_id in finished and (waiting_too or not kept.waits)
            if may_go and kept.row.get(self.metric) is not None:
                cells[self.cell(kept.row)].append(kept)
        for alike in cells.values():
            best = alike[0]
            for kept in alike[1:]:
                if self._is_better(kept.row[self.metric], best.row[self.metric]):
                    best = kept
            for kept in alike:
                if kept is not best:
                    remove_artifact(artifact_folder(sweep, kept.trial_id))

    def _is_better(self, value: float, other: float) -> bool:
        return value < other if self.mode == "min" else value > other


def _has_row(sweep: Path, kept: Kept) -> bool:
    """Of this launch: the process of one without may have ended, and its trial may yet fail."""
    return (sweep / TRIALS / f"{kept.trial_id}.parquet").exists()
