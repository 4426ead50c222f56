"""From what is known before a trial and what it found out to its row. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from raysweep.errors import RaysweepError
from raysweep.results.schema import planned_columns
from raysweep.results.writer import now, write_rows
from raysweep.shards.group_info import ShardGroup
from raysweep.shards.trial import Outcome, run_trial
from raysweep.sweep.identified import SweepTrial


@dataclass(frozen=True)
class RowContext:
    """What all rows of one phase have in common.

    folder: of the sweep;  names: of the evaluation entries;  columns: equal in every row
    """

    folder: Path
    names: tuple[str, ...]
    columns: Mapping[str, Any]

    def write(self, trial: SweepTrial, outcome: Outcome, started_at: datetime) -> dict[str, Any]:
        """Writes the rows of a finished trial; returns the trial's."""
        row = self._known(trial, started_at) | {"status": "finished"} | outcome.columns
        if row.get("tokens_unique") is not None:
            row["tokens_trained"] = row["tokens_unique"] * (trial.trial.epochs or 1)
        write_rows(self.folder, row, outcome.units, self.names)
        return row

    def write_failure(self, trial: SweepTrial, error: Exception, started_at: datetime) -> dict[str, Any]:
        """Writes the row of a failed trial, which says why."""
        reason = str(error) if isinstance(error, RaysweepError) else f"{type(error).__name__}: {error}"
        row = self._known(trial, started_at) | {"status": "failed", "error": reason}
        write_rows(self.folder, row, [], self.names)
        return row

    def _known(self, trial: SweepTrial, started_at: datetime) -> dict[str, Any]:
        identities = {"trial_id": trial.trial_id, "recovery_id": trial.recovery_id}
        columns = dict(self.columns)
        if trial.planned.calibration is None:
            columns.pop("calibration_hash", None)
        return {
            **planned_columns(trial.planned),
            **columns,
            **identities,
            "started_at": started_at,
            "finished_at": now(),
        }


def run_and_write(group: ShardGroup, trial: SweepTrial, rows: RowContext) -> dict[str, Any]:
    """Runs one trial and writes its row, also when it fails. Returns the row, with its label."""
    started_at = now()
    try:
        outcome = run_trial(group, trial.trial, trial.trial_id, trial.number)
        row = rows.write(trial, outcome, started_at)
    except Exception as error:  # whatever it was, the row says so and the sweep goes on
        row = rows.write_failure(trial, error, started_at)
    return row | {"label": trial.label}


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what is null and without moments: what Tune and displays need of it."""
    return {
        name: value for name, value in row.items() if value is not None and not isinstance(value, datetime)
    }
