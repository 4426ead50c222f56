"""The phases of one model: trials on shards, retraining on all devices, and the measuring of what came of it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from raysweep.baseline.plan import RetrainPlan
from raysweep.config.space import SearchSpace
from raysweep.fingerprint import fingerprint
from raysweep.launching.prepared import Launch
from raysweep.launching.recorder import Recorder
from raysweep.launching.retraining import Retraining, telling
from raysweep.launching.runners import Runner
from raysweep.launching.tracing import Tracing
from raysweep.results.folders import TUNE
from raysweep.results.reader import load_results, trial_rows, trial_states
from raysweep.shards.group_info import GroupInfo
from raysweep.shards.plan import ShardPlan
from raysweep.shards.setup import OwnedGroup, set_up, shard_specs
from raysweep.shards.trial import DENSE_KEY, known_perplexity, pruned_key
from raysweep.sweep.prepare import Phase, PreparedModel
from raysweep.sweep.proposals import Proposals
from raysweep.sweep.rows import RowContext

if TYPE_CHECKING:
    pass


class ModelRun:
    """One model from beginning to end: trials on shards, then retraining on all devices, then the shards measure what
    came of it. A shard cannot give back its devices while it lives, so the group ends in between."""

    def __init__(
        self,
        prepared: Launch,
        model: PreparedModel,
        plan: ShardPlan,
        retrain_plan: RetrainPlan | None,
        runner: Runner,
        recorder: Recorder,
        tracing: Tracing | None = None,
    ) -> None:
        self.prepared, self.model, self.plan = prepared, model, plan
        self.retrain_plan, self.runner, self.recorder = retrain_plan, runner, recorder
        self.progress, self.tracing = recorder.progress, tracing
        steps = prepared.space.execution.checkpoint_steps
        self.retraining = Retraining(prepared.folder, model, prepared.to_retrain(model), steps)

    def run(self) -> None:
        self.retraining.forget_failures()
        self._on_shards(retrained=False)
        if self.retrain_plan is None:
            return
        if jobs := self.retraining.jobs():
            workers = self.retrain_plan.workers_text
            self.progress.stage(f"Starting {workers} for {len(jobs)} retraining{'s' * (len(jobs) > 1)}")
            with telling(jobs, self.progress.stage):
                self.runner.retrain(jobs, self.retrain_plan, self.prepared.folder / TUNE)
        self.prepared = replace(self.prepared, rows=trial_rows(self.prepared.folder))
        self._on_shards(retrained=True)
        self.retraining.clean_up(trial_states(self.prepared.folder))

    def _on_shards(self, retrained: bool) -> None:
        """The phases of the model, one after another on the same shards."""
        phases = [phase for phase in self.model.phases if self._has_work(phase, retrained)]
        if not phases:
            return
        shards = self.plan.shards
        specs = shard_specs(self.plan, self.model.source, traces=self.tracing is not None)
        self.progress.stage(f"Loading {self.model.config.path} into {shards} shard{'s' * (shards > 1)}")
        with self.runner.group(_group_name(self.prepared), specs, self.plan) as group:
            for phase in phases:
                self._phase(group, phase, retrained)
                if not retrained:
                    waiting = self.prepared.remaining(phase, retrained=True)
                    self.retraining.write_starts(group, waiting, self.progress.stage)
            if self.tracing is not None:
                self.tracing.add_shards(group.spans())

    def _has_work(self, phase: Phase, retrained: bool) -> bool:
        waiting = self.prepared.remaining(phase, retrained=True)
        if retrained:
            return bool(waiting)
        lacking = any(map(self.retraining.lacks_start, waiting))
        return bool(lacking or self.prepared.remaining(phase) or self.prepared.left_of(phase))

    def _phase(self, group: OwnedGroup, phase: Phase, retrained: bool) -> None:
        prepared, model = self.prepared, self.model
        granularities = sorted({trial.granularity for trial in model.possible if trial.granularity})
        self.progress.stage(f"Dense pass and statistics (calibration seed {phase.calibration.seed})")
        texts = {name: tokens.input_ids for name, tokens in model.texts(phase).items()}
        info = set_up(group, self.plan.ranges, texts, granularities, model.shape, model.own_criteria)
        for key, value in _known_results(prepared, model, phase, info).items():
            group.share(key, "earlier launch", partial(_the_same, value))
        columns = _phase_columns(prepared.space, model, phase, self.plan, info, self.runner)
        keep = {} if retrained else self.retraining.starts(prepared.remaining(phase, retrained=True))
        rows = RowContext(prepared.folder, tuple(model.evaluation), columns, keep)
        self.recorder.begin(self.plan.concurrent_trials)
        proposals = Proposals(
            prepared.remaining(phase, retrained),
            () if retrained else phase.studies,
            prepared.space.search,
            model.identify,
            max(trial.number for trial in model.trials) + 1,
            prepared.done_rows,
            prepared.earlier,
        )
        self.runner.run(group, proposals, rows, self.plan, prepared.space.search, self.recorder.row)


def _the_same(value: Any) -> Any:
    return value


def _group_name(prepared: Launch) -> str:
    """Tells sweeps of one name in different storages apart, on a cluster that runs both."""
    return f"{prepared.space.name}-{fingerprint(str(prepared.folder))[:4]}"


def _phase_columns(
    space: SearchSpace, model: PreparedModel, phase: Phase, plan: ShardPlan, info: GroupInfo, runner: Runner
) -> dict[str, Any]:
    """Columns that are equal in all rows of a phase."""
    import torch
    import transformers

    from raysweep import __version__

    return {
        "sweep": space.name,
        "dtype": model.dtype,
        "model_hash": model.model_hash,
        "calibration_hash": phase.tokens.content_hash,
        "evaluation_protocol": json.dumps(space.evaluation_protocol(), sort_keys=True),
        "raysweep_version": __version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "ray_version": runner.ray_version,
        "device_name": info.device_name,
        "shards": plan.shards,
        "fallbacks": 0,
        "retries": 0,
    }


def _known_results(prepared: Launch, model: PreparedModel, phase: Phase, info: GroupInfo) -> dict[str, Any]:
    """Perplexities that earlier launches found and that trials of this phase need again, by their key."""
    done = {
        trial.trial_id: trial.trial
        for trial in (*model.phases[0].trials, *phase.trials)
        if prepared.is_done(trial)
    }
    wanted = {identity for identity, trial in done.items() if trial.recovery in ("dense", "none")}
    if not wanted:
        return {}
    rows = load_results(prepared.folder)
    perplexities = dict(zip(rows.trial_id, rows.perplexity, strict=True))
    mine = {trial.trial_id for trial in phase.trials}
    known: dict[str, Any] = {}
    for identity in sorted(wanted):
        trial = done[identity]
        if trial.is_dense or identity in mine:
            key = DENSE_KEY if trial.is_dense else pruned_key(trial)
            known[key] = known_perplexity(info, float(perplexities[identity]))
    return known
