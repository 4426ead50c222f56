"""A sweep as it will run: what is planned, what is done, and what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raysweep.baseline.plan import RetrainPlan
from raysweep.cluster.nodes import Node
from raysweep.config.space import SearchSpace
from raysweep.config.studies import Study
from raysweep.fingerprint import fingerprint
from raysweep.launching.retraining import is_retrained, retrain_plan
from raysweep.model.tasks import TaskSet
from raysweep.results.artifacts import ALL, NONE, Keeping
from raysweep.results.schema import NUMERICAL, planned_columns
from raysweep.shards.memory import SIZES
from raysweep.sweep.identified import SweepTrial
from raysweep.sweep.prepare import Phase, PreparedModel
from raysweep.sweep.proposals import Chosen, chosen_by


@dataclass(frozen=True)
class Launch:
    """A sweep as it will run.

    rows: that are there already, by trial_id
    retry_failed: whether trials run again that failed numerically, as they will again unless something has changed
    settled: identities of trials that this launch has run, to whatever end
    """

    space: SearchSpace
    folder: Path
    models: list[PreparedModel]
    rows: dict[str, dict[str, Any]]
    retry_failed: bool = False
    settled: frozenset[str] = frozenset()

    @property
    def tag(self) -> str:
        """Tells sweeps of one name in different storages apart, on a cluster that runs both."""
        return f"{self.space.name}-{fingerprint(str(self.folder))[:4]}"

    @property
    def tasks(self) -> TaskSet | None:
        """That models are measured on, the same for all."""
        return self.models[0].tasks

    @property
    def held(self) -> str:
        """Which trials' weights lie on storage until the sweep ends, as of `execution.keep`: all where tasks wait for
        them."""
        return ALL if self.space.tasks_of_all else self.space.execution.keep

    def reader_of_weights(self, retrains: bool) -> str | None:
        """What of the sweep reads weights that shards have written, in words; None where nothing does.

        retrains: whether something is to be retrained
        """
        if retrains:
            return "retraining"
        return "tasks on all trials" if self.space.tasks_of_all else None

    @property
    def trials(self) -> list[SweepTrial]:
        """Those that are known before; studies choose others as they go."""
        return [trial for model in self.models for trial in model.trials]

    @cached_property
    def done_rows(self) -> dict[str, dict[str, Any]]:
        """The rows of trials that will not run again."""
        return {
            identity: row
            for identity, row in self.rows.items()
            if identity in self.settled or self._stays(row)
        }

    @cached_property
    def finished_ids(self) -> frozenset[str]:
        """Of the trials whose rows say that they have finished."""
        return frozenset(identity for identity, row in self.rows.items() if row["status"] == "finished")

    def _stays(self, row: Mapping[str, Any]) -> bool:
        """Finished trials and those that a scheduler stopped are never run again; failed ones are, or may be."""
        return row["status"] != "failed" or (row.get("error_kind") == NUMERICAL and not self.retry_failed)

    @property
    def planned(self) -> int:
        """Trials of the sweep, those of studies as many as they may run."""
        return len(self.trials) + sum(study.samples for phase in self._phases for study in phase.studies)

    def is_done(self, trial: SweepTrial) -> bool:
        return trial.trial_id in self.done_rows

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

    def storage_bytes(self, model: PreparedModel, concurrent_trials: int) -> int:
        """The most that a model's trials have on storage at once beside their rows, undisturbed: recovered units of the
        trials in flight; of retraining start weights with masks, retrained weights, and two checkpoints while one
        replaces the other, with weights and both moments in float32; and kept trials."""
        size, parameters = SIZES[model.dtype], model.shape.parameters
        linears = sum(outputs * inputs for outputs, inputs in model.shape.linears.values())
        recovers = any(trial.recovery == "reconstruct" for trial in model.possible)
        units = concurrent_trials * parameters * size if recovers else 0
        retrained = self.to_retrain(model)
        starts = len({trial.start_id for trial in retrained})
        weights = starts * (linears + parameters * size) + len(retrained) * parameters * size
        kept = self.kept_bytes(model, self.held, concurrent_trials)
        return units + weights + (2 * 3 * 4 * parameters if retrained else 0) + kept

    def kept_bytes(self, model: PreparedModel, keep: str, concurrent_trials: int = 0) -> int:
        """Of the most trials of a model that are kept, with those that a better one will have replaced: weights of the
        blocks and masks; of those that retraining trains as a whole what lies outside as well."""
        size, shape = SIZES[model.dtype], model.shape
        masks = sum(outputs * inputs for outputs, inputs in shape.linears.values())
        each = masks + size * sum(block.parameters for block in shape.blocks)
        if any(trial.recovery == "retrain" and trial.trainable == "all" for trial in model.possible):
            each += 2 * size * shape.vocabulary_parameters
        return each * self._kept_trials(model, keep, concurrent_trials)

    def _kept_trials(self, model: PreparedModel, keep: str, concurrent_trials: int) -> int:
        """The most that are there at once: all, or the best of every cell with those in flight."""
        if keep == NONE:
            return 0
        dense = sum(trial.trial.is_dense for trial in model.trials)
        most = len(model.trials) - dense + sum(s.samples for phase in model.phases for s in phase.studies)
        if keep == ALL:
            return most
        keeping = Keeping.of(keep, self.space.search)
        corners = (corner for phase in model.phases for study in phase.studies for corner in study.corners())
        planned = [*(trial.planned for trial in model.trials if not trial.trial.is_dense), *corners]
        cells = {keeping.cell(planned_columns(one)) for one in planned}
        return min(most, len(cells) + concurrent_trials)

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
    def to_run(self) -> int:
        """Trials of the sweep that have no row to stay, those of studies as many as they may run."""
        left = sum(map(self.left_of, self._phases))
        return left + sum(not self.is_done(trial) for trial in self.trials)

    @cached_property
    def failed(self) -> int:
        """Trials of the sweep that failed before and stay so."""
        chosen = {identity for study in self.earlier.values() for identity in study}
        mine = {trial.trial_id for trial in self.trials} | chosen
        return sum(row["status"] == "failed" for identity, row in self.done_rows.items() if identity in mine)

    @property
    def finished(self) -> int:
        """Trials of the sweep that are finished or were stopped by a scheduler."""
        return self.planned - self.to_run - self.failed

    @property
    def others(self) -> int:
        """Finished rows in the folder of trials that are not in this space, but of another grid, model or text."""
        finished = [row for row in self.done_rows.values() if row["status"] != "failed"]
        return max(0, len(finished) - self.finished)
