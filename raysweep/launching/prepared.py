"""A sweep as it will run: what is planned, what is done, and what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.baseline.plan import RetrainPlan
from raysweep.cluster.nodes import Node
from raysweep.config.space import SearchSpace
from raysweep.config.studies import Study
from raysweep.launching.retraining import is_retrained, retrain_plan
from raysweep.sweep.identified import SweepTrial
from raysweep.sweep.prepare import Phase, PreparedModel
from raysweep.sweep.proposals import Chosen, chosen_by

if TYPE_CHECKING:
    pass


DONE = ("finished", "stopped")  # statuses of trials that are never run again


@dataclass(frozen=True)
class Launch:
    """A sweep as it will run. rows: that are there already, by trial_id."""

    space: SearchSpace
    folder: Path
    models: list[PreparedModel]
    rows: dict[str, dict[str, Any]]

    @property
    def trials(self) -> list[SweepTrial]:
        """Those that are known before; studies choose others as they go."""
        return [trial for model in self.models for trial in model.trials]

    @cached_property
    def states(self) -> dict[str, str]:
        """Status of every row that is there, by trial_id."""
        return {identity: row["status"] for identity, row in self.rows.items()}

    @cached_property
    def done_rows(self) -> dict[str, dict[str, Any]]:
        """The rows of trials that will not run again."""
        return {identity: row for identity, row in self.rows.items() if row["status"] in DONE}

    @property
    def planned(self) -> int:
        """Trials of the sweep, those of studies as many as they may run."""
        return len(self.trials) + sum(study.samples for phase in self._phases for study in phase.studies)

    def is_done(self, trial: SweepTrial) -> bool:
        """Finished trials are never run again; failed ones are."""
        return self.states.get(trial.trial_id) in DONE

    def remaining(self, phase: Phase, retrained: bool = False) -> list[SweepTrial]:
        """Trials of a phase that are to run: those that shards run alone, or those that are retrained."""
        return [
            trial for trial in phase.trials if not self.is_done(trial) and is_retrained(trial) == retrained
        ]

    def to_retrain(self, model: PreparedModel) -> list[SweepTrial]:
        """Trials of a model that are to be retrained."""
        return [trial for phase in model.phases for trial in self.remaining(phase, retrained=True)]

    def retrain_plan(self, model: PreparedModel, nodes: Sequence[Node]) -> RetrainPlan | None:
        """How the trials of a model are retrained; None where none is. Raises CapacityError."""
        return retrain_plan(model, self.to_retrain(model), nodes, self.space.execution)

    def left_of(self, phase: Phase) -> int:
        """How many trials the studies of a phase will still run."""
        return sum(map(self.left_of_study, phase.studies))

    def left_of_study(self, study: Study) -> int:
        """How many trials a study will still run."""
        return study.samples - len(self.earlier[study.number])

    @cached_property
    def earlier(self) -> dict[int, Chosen]:
        """By number of a study, its trials that are done."""
        found: dict[int, Chosen] = {}
        for model in self.models:
            rows = dict(self.done_rows)
            for trial in model.trials:
                rows.pop(trial.trial_id, None)
            for study in (study for phase in model.phases for study in phase.studies):
                found[study.number] = chosen_by(study, model.identify, rows)
                for trial_id in found[study.number]:
                    del rows[trial_id]
        return found

    @property
    def _phases(self) -> list[Phase]:
        return [phase for model in self.models for phase in model.phases]

    @cached_property
    def finished(self) -> int:
        left = sum(map(self.left_of, self._phases))
        return self.planned - left - sum(not self.is_done(trial) for trial in self.trials)

    @property
    def others(self) -> int:
        """Finished rows in the folder of trials that are not in this space, but of another grid, model or text."""
        known = self.finished
        return max(0, len(self.done_rows) - known)
