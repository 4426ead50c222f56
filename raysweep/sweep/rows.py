"""From what is known before a trial and what it found out to its row. No torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from raysweep.errors import NumericalError, RaysweepError, ShardLostError, StorageError, first_line
from raysweep.results.artifacts import NONE, Keeping, Kept, artifact_folder, remove_artifact
from raysweep.results.folders import unfinished_folder
from raysweep.results.schema import NUMERICAL, OTHER, planned_columns
from raysweep.results.writer import now, write_rows
from raysweep.shards.artifact import Artifact
from raysweep.shards.group_info import ShardGroup
from raysweep.shards.outcome import Outcome, Rung
from raysweep.shards.trial import TrialFolders, run_in_rungs
from raysweep.sweep.identified import SweepTrial


@dataclass(frozen=True)
class RowContext:
    """What all rows of one phase have in common.

    folder: of the sweep;  names: of the evaluation entries;  columns: equal in every row
    keep: where the weights of some trials are written for retraining, by recovery_id
    retries: how often trials were begun again, by trial_id
    goes_on: whether units and batches wait in the folder until their trial has its row
    tasks: that some rows get columns of later
    keeping: whose weights stay there;  blocks: of the model
    """

    folder: Path
    names: tuple[str, ...]
    columns: Mapping[str, Any]
    keep: Mapping[str, Path] = field(default_factory=dict)
    goes_on: bool = True
    retries: Mapping[str, int] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    keeping: Keeping = field(default_factory=Keeping)

    def write(
        self, trial: SweepTrial, outcome: Outcome, rungs: Sequence[Rung], started_at: datetime
    ) -> dict[str, Any]:
        """Writes the rows of a finished trial; returns the trial's, with `not_kept` where its weights were to stay on
        storage and could not."""
        row = self._known(trial, started_at) | {"status": "finished"} | outcome.columns | _values(rungs)
        not_kept = self._mark(row) if outcome.kept else outcome.not_kept
        write_rows(self.folder, row, outcome.units, self.names, self.tasks)
        return row | ({"not_kept": not_kept} if not_kept else {})

    def artifact(self, trial: SweepTrial) -> Artifact | None:
        """Where the weights of the trial stay if it is one of those that are kept."""
        if self.keeping.keep == NONE or trial.trial.is_dense:
            return None
        known = {**planned_columns(trial.planned), **self.columns, "trial_id": trial.trial_id}
        folder = artifact_folder(self.folder, trial.trial_id)
        return Artifact(folder, lambda columns: self.keeping.wants(self.folder, known | dict(columns)))

    def _mark(self, row: Mapping[str, Any]) -> str | None:
        """Makes what the shards have written a kept trial, before its row is there: a row without its weights could
        not be told from one that is not kept. Returns why that could not be done."""
        folder = artifact_folder(self.folder, row["trial_id"])
        try:
            Kept.of(row, folder, self.keeping.until_tasks).write(folder)
        except (
            StorageError,
            ValueError,
        ) as error:  # the latter for numbers that are none: the row will say so
            remove_artifact(folder)
            return first_line(error)
        return None

    def write_failure(self, trial: SweepTrial, error: Exception, started_at: datetime) -> dict[str, Any]:
        """Writes the row of a failed trial, which says why."""
        reason = str(error) if isinstance(error, RaysweepError) else f"{type(error).__name__}: {error}"
        kind = NUMERICAL if isinstance(error, NumericalError) else OTHER
        columns = {"status": "failed", "error": reason, "error_kind": kind}
        return self._without_units(trial, columns, started_at)

    def write_stopped(self, trial: SweepTrial, rungs: Sequence[Rung], started_at: datetime) -> dict[str, Any]:
        """Writes the row of a trial that the scheduler stopped at the last of `rungs`: where, and what it had cost."""
        columns = {"status": "stopped", "stopped_at": rungs[-1].fraction}
        return self._without_units(trial, columns | rungs[-1].cost | _values(rungs), started_at)

    def _without_units(
        self, trial: SweepTrial, columns: dict[str, Any], started_at: datetime
    ) -> dict[str, Any]:
        row = self._known(trial, started_at) | columns
        write_rows(self.folder, row, [], self.names, self.tasks)
        return row

    def _known(self, trial: SweepTrial, started_at: datetime) -> dict[str, Any]:
        identities = {"trial_id": trial.trial_id, "recovery_id": trial.recovery_id, "study": trial.study}
        columns = dict(self.columns)
        if trial.planned.calibration is None:
            columns.pop("calibration_hash", None)
        return {
            **planned_columns(trial.planned),
            **columns,
            **identities,
            "retries": self.retries.get(trial.trial_id, 0),
            "started_at": started_at,
            "finished_at": now(),
        }


@dataclass(frozen=True)
class Rungs:
    """Where a scheduler looks at trials: fractions of the blocks, and the column that it looks at."""

    fractions: tuple[float, ...]
    metric: str


def _values(rungs: Sequence[Rung]) -> dict[str, Any]:
    """What schedulers of later launches are told of a trial's rungs."""
    return {"rungs": json.dumps({str(rung.number): rung.value for rung in rungs})} if rungs else {}


def run_and_write(group: ShardGroup, trial: SweepTrial, rows: RowContext) -> dict[str, Any]:
    """Runs one trial and writes its row, also when it fails. Returns the row, with its label."""
    *_, row = run_in_steps(group, trial, rows, None)
    if isinstance(row, Rung):
        raise RuntimeError("a trial without rungs ended at one")
    return row


def run_in_steps(
    group: ShardGroup, trial: SweepTrial, rows: RowContext, rungs: Rungs | None
) -> Iterator[Rung | dict[str, Any]]:
    """The same with a halt at every rung. Closing the iterator there stops the trial and writes that as its row."""
    started_at, passed = now(), list[Rung]()
    unfinished = unfinished_folder(rows.folder, trial.trial_id)
    try:
        fractions, metric = (rungs.fractions, rungs.metric) if rungs else ((), None)
        arguments = (group, trial.trial, trial.trial_id, trial.number, fractions, metric)
        start = rows.keep.get(trial.recovery_id)
        folders = TrialFolders(trial.retraining(rows.folder), start, rows.artifact(trial))
        if rows.goes_on:
            folders = replace(
                folders,
                unfinished=unfinished,
                pruned=unfinished_folder(rows.folder, trial.pruned_id) if trial.pruned_id else None,
                dense=unfinished_folder(rows.folder, trial.dense_id),
            )
        with closing(run_in_rungs(*arguments, folders, trial.label)) as steps:
            for found in steps:
                if isinstance(found, Rung):
                    passed.append(found)
                    yield found
                else:
                    row = rows.write(trial, found, passed, started_at)
                    shutil.rmtree(unfinished, ignore_errors=True)
    except GeneratorExit:
        if passed:
            rows.write_stopped(trial, passed, started_at)
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    except (
        ShardLostError,
        StorageError,
    ):  # nothing is known of the trial, or it cannot be said: it has no row
        raise
    except Exception as error:  # whatever it was, the row says so and the sweep goes on
        remove_artifact(artifact_folder(rows.folder, trial.trial_id))
        row = rows.write_failure(trial, error, started_at)
        if row["error_kind"] == NUMERICAL:
            shutil.rmtree(unfinished, ignore_errors=True)
    yield row | {"label": trial.label}


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what is null and without moments: what Tune and displays need of it."""
    return {
        name: value for name, value in row.items() if value is not None and not isinstance(value, datetime)
    }
