"""Asynchronous successive halving within each cell: Ray Tune's own, one bracket for each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from raysweep.config.sections import SearchConfig
from raysweep.results.schema import planned_columns
from raysweep.sweep.identified import SweepTrial
from raysweep.sweep.rows import Rungs

REDUCTION = 4  # of the trials at a rung, about one in so many goes on
SIXTEENTHS = (1, 4)  # of the blocks at the rungs; 16 is the end
TIME, TRIAL = "sixteenths", "trial"


def rungs_of(search: SearchConfig) -> Rungs | None:
    """Where trials halt; None without a scheduler.

    A rung is a fraction of the blocks, not of the epochs: the blocks that are done have run through their whole
    learning rate schedule, so that what a rung shows is final for them, and a trial that goes on ends with the numbers
    that it would have without a scheduler.
    """
    if search.scheduler != "asha":
        return None
    return Rungs(tuple(part / 16 for part in SIXTEENTHS), search.metric)


class CellHalving(FIFOScheduler):
    """Compares a trial at a rung with those of its own cell, also with those of earlier launches.

    Only with those of equal granularity and of the same kind of order, though: others have other blocks pruned there.

    earlier: rows, by trial_id
    """

    def __init__(self, search: SearchConfig, earlier: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self._search = search
        self._brackets: dict[tuple[Any, ...], ASHAScheduler] = {}
        for trial_id, row in earlier.items():
            if row.get("rungs"):
                self._tell(trial_id, row)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._bracket(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        return self._bracket(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._bracket(trial).on_trial_complete(tune_controller, trial, result)

    def _tell(self, trial_id: str, row: Mapping[str, Any]) -> None:
        """Has the bracket of its cell note what a trial was worth at its rungs; what it decides is of no interest."""
        bracket: Any = self._of_cell(row)  # any: it looks at nothing of a trial but its id
        trial = SimpleNamespace(trial_id=trial_id)
        bracket.on_trial_add(None, trial)
        for number, value in json.loads(row["rungs"]).items():
            if value is not None:
                bracket.on_trial_result(
                    None, trial, {TIME: SIXTEENTHS[int(number)], self._search.metric: value}
                )

    def _bracket(self, trial: Any) -> ASHAScheduler:
        planned: SweepTrial = trial.config[TRIAL]
        return self._of_cell(planned_columns(planned.planned))

    def _of_cell(self, columns: Mapping[str, Any]) -> ASHAScheduler:
        in_order = columns.get("input_stream") == "pruned" or columns.get("statistics_stream") == "recovered"
        cell = (
            *(columns.get(name) for name in self._search.compare_within),
            columns.get("granularity"),
            in_order,
        )
        if cell not in self._brackets:
            self._brackets[cell] = ASHAScheduler(
                time_attr=TIME,
                metric=self._search.metric,
                mode=self._search.mode,
                max_t=16,
                grace_period=SIXTEENTHS[0],
                reduction_factor=REDUCTION,
            )
        return self._brackets[cell]
