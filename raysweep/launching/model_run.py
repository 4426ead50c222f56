"""The phases of one model: trials on shards, retraining on all devices, and the measuring of what came of it."""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from raysweep.baseline.plan import RetrainPlan
from raysweep.cluster.nodes import Node
from raysweep.config.space import SearchSpace
from raysweep.errors import CapacityError, ShardLostError, first_line
from raysweep.launching.prepared import Launch
from raysweep.launching.reality import Keeper
from raysweep.launching.recorder import Recorder
from raysweep.launching.retraining import Retraining, telling
from raysweep.launching.runners import Runner
from raysweep.launching.tracing import Tracing
from raysweep.launching.watching import watching
from raysweep.results.artifacts import NONE, Keeping
from raysweep.results.folders import TUNE
from raysweep.results.reader import load_results, trial_rows
from raysweep.results.uris import CACHE_VARIABLE, is_shared
from raysweep.results.writer import now
from raysweep.shards.group_info import GroupInfo
from raysweep.shards.plan import ShardPlan
from raysweep.shards.setup import OwnedGroup, set_up, shard_specs
from raysweep.shards.trial import DENSE_KEY, known_perplexity, pruned_key
from raysweep.sweep.identified import SweepTrial
from raysweep.sweep.planning import make_plans
from raysweep.sweep.prepare import Phase, PreparedModel
from raysweep.sweep.proposals import Proposals
from raysweep.sweep.rows import RowContext

MOST_LOSSES = 3  # of one trial, and of shards in a row while no trial runs
LOOK_FOR_NODES_S = 2.0


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
        nodes: Sequence[Node],
        tracing: Tracing | None = None,
        fail_fast: bool = False,
        keeper: Keeper | None = None,
    ) -> None:
        """nodes: that the plans are for;  keeper: is told what shards have held
        fail_fast: whether nothing new begins once a trial has failed"""
        self.prepared, self.model, self.plan = prepared, model, plan
        self.retrain_plan, self.runner, self.recorder = retrain_plan, runner, recorder
        self.progress, self.tracing = recorder.progress, tracing
        self._nodes, self._fail_fast, self.has_failed = nodes, fail_fast, False
        self._keeper = keeper
        self._begun, self._heard_of, self._lost = now(), set[str](), Counter[str]()
        self._keeping = Keeping()
        steps = prepared.space.execution.checkpoint_steps
        self.retraining = Retraining(prepared.folder, model, prepared.to_retrain(model), steps)

    def run(self) -> None:
        self.retraining.forget_failures()
        self._on_shards(retrained=False)
        if self.retrain_plan is None or self._is_over:
            return
        if jobs := self.retraining.jobs():
            workers = self.retrain_plan.workers_text
            self.progress.stage(f"Starting {workers} for {len(jobs)} retraining{'s' * (len(jobs) > 1)}")
            with telling(jobs, self.progress.stage):
                self.runner.retrain(jobs, self.retrain_plan, self.prepared.folder / TUNE)
        self._read_rows()
        self._on_shards(retrained=True)
        self._read_rows()
        self.retraining.clean_up(replace(self.prepared, retry_failed=False).done_rows)

    @property
    def _is_over(self) -> bool:
        return self._fail_fast and self.has_failed

    def _read_rows(self) -> None:
        rows = trial_rows(self.prepared.folder)
        self.prepared = replace(self.prepared, rows=rows, settled=frozenset(self._heard_of))

    def _on_shards(self, retrained: bool) -> None:
        """The phases of the model. Where a shard is lost all are started again, and what has no row yet goes on from
        the units that it has left. Raises ShardLostError when shards end again and again before a trial runs."""
        in_a_row = 0
        while not self._is_over:
            phases = [phase for phase in self.model.phases if self._has_work(phase, retrained)]
            if not phases:
                return
            self._follow_nodes(retrained)
            before = (len(self._heard_of), self._lost.total())
            try:
                self._through_a_group(phases, retrained)
                return
            except ShardLostError as error:
                self._read_rows()
                in_a_row = in_a_row + 1 if before == (len(self._heard_of), self._lost.total()) else 0
                if self.runner.nodes() != self._nodes:
                    in_a_row = 0
                if in_a_row == MOST_LOSSES:
                    raise
                self.progress.stage(f"Going on with new shards: {first_line(error)}")

    def _follow_nodes(self, retrained: bool) -> None:
        """Plans anew where the nodes are not those that were planned for; the number of shards changes no number. While
        they cannot hold the model, waits for others, and says so."""
        said = ""
        while (nodes := self.runner.nodes()) != self._nodes:
            try:
                self._plan_for(nodes, retrained)
                return
            except CapacityError as error:
                if said != (said := first_line(error)):
                    self.progress.stage(f"Waiting for other nodes: {said}")
                time.sleep(LOOK_FOR_NODES_S)

    def _plan_for(self, nodes: Sequence[Node], retrained: bool) -> None:
        """Numbers are those of one kind of device, so that it stays. Raises CapacityError, and ShardLostError
        where none is left: a cluster that has ended takes in no other."""
        if not nodes:
            raise ShardLostError("the Ray cluster has ended, this process's own node with it")
        on_gpus = self.plan.device == "cuda"
        if on_gpus and not any(node.gpus for node in nodes):
            raise CapacityError("no node with a GPU is left")
        folder = self.prepared.folder
        if len(nodes) > 1 and is_shared(folder) and (strangers := self.runner.strangers(folder)):
            raise CapacityError(f"these do not share the storage: {'; '.join(strangers)}")
        reader = self.prepared.reader_of_weights(self.retrain_plan is not None)
        if len(nodes) > 1 and reader is not None and not is_shared(folder):
            raise CapacityError(f"{reader} would look for weights in mirrors that nodes have apart")
        used = nodes if on_gpus else [replace(node, gpus=0) for node in nodes]
        (self.plan,) = make_plans([self.model], self.prepared.space, used, self.runner.one_at_a_time)
        if not retrained:
            self.retrain_plan = self.prepared.retrain_plan(self.model, used)
        self._nodes = nodes

    def _through_a_group(self, phases: Sequence[Phase], retrained: bool) -> None:
        """The phases, one after another on the same shards."""
        shards, replicas = self.plan.shards, self.plan.replicas
        specs = shard_specs(self.plan, self.model.source, traces=self.tracing is not None)
        times = f"{replicas} times " if replicas > 1 else ""
        self.progress.stage(
            f"Loading {self.model.config.path} into {times}{shards} shard{'s' * (shards > 1)}"
        )
        # A name is taken for a while after its group has ended, so that each has another.
        name = f"{self.prepared.tag}/{secrets.token_hex(2)}"
        with self.runner.group(name, specs, self.plan) as group:
            with watching(group, self.recorder.shards):
                self._go_through(phases, group, retrained)
            if self._keeper is not None:
                self._keeper.note(self.plan, group.peaks())
            if self.tracing is not None:
                self.tracing.add_shards(group.spans())

    def _go_through(self, phases: Sequence[Phase], group: OwnedGroup, retrained: bool) -> None:
        for phase in phases:
            self._phase(group, phase, retrained)
            if self._is_over:
                return
            if not retrained:
                waiting = self.prepared.remaining(phase, retrained=True)
                self.retraining.write_starts(group, waiting, self.progress.stage)

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
        placement = self.plan.placement
        info = set_up(
            group, self.plan.ranges, texts, granularities, model.shape, model.own_criteria, placement
        )
        for key, value in _known_results(prepared, model, phase, info).items():
            group.share(key, "earlier launch", partial(_the_same, value))
        columns = _phase_columns(prepared.space, model, phase, self.plan, info, self.runner)
        keep = {} if retrained else self.retraining.starts(prepared.remaining(phase, retrained=True))
        goes_on = len(self._nodes) == 1 or is_shared(prepared.folder)
        rows = RowContext(prepared.folder, tuple(model.evaluation), columns, keep, goes_on)
        self._keeping = self._kept_by(prepared.rows.values(), goes_on)
        rows = replace(rows, keeping=self._keeping, tasks=prepared.space.evaluation.tasks)
        self.recorder.begin(self.plan)
        while True:
            proposals = self._proposals(phase, retrained)
            hear = partial(self._hear, proposals)
            rows = replace(rows, retries=dict(self._lost))
            lost = self.runner.run(group, proposals, rows, self.plan, prepared.space.search, hear)
            if not lost:
                return
            self._note_losses(lost, rows)
            group.check()  # raises where it was a shard; else trials alone have lost their processes
            if self._is_over:
                return

    def _kept_by(self, rows: Iterable[dict[str, Any]], goes_on: bool) -> Keeping:
        """Whose weights stay on storage. Where its folder is not the same for all shards, it would get some blocks."""
        held, search = self.prepared.held, self.prepared.space.search
        if not goes_on and held != NONE:
            self.progress.stage(
                f"No trial is kept: the mirror of the storage is each node's own ({CACHE_VARIABLE})"
            )
        until_tasks = held != self.prepared.space.execution.keep
        return replace(Keeping.of(held if goes_on else NONE, search, rows), until_tasks=until_tasks)

    def _hear(self, proposals: Proposals | None, row: dict[str, Any]) -> None:
        self._heard_of.add(row["trial_id"])
        self.recorder.row(row)
        if row.get("status") == "finished":
            self._keeping.remove_superseded(self.prepared.folder, self._heard_of | self.prepared.finished_ids)
        self.has_failed |= row.get("status") == "failed"
        if self._is_over and proposals is not None:
            proposals.end()

    def _note_losses(self, lost: Sequence[SweepTrial], rows: RowContext) -> None:
        """Of trials whose end nobody has told of. Some have their rows; one that is lost again and again fails."""
        self._read_rows()
        for trial in lost:
            row = self.prepared.rows.get(trial.trial_id)
            if row is None or row["finished_at"] < self._begun:
                self._lost[trial.trial_id] += 1
                if self._lost[trial.trial_id] < MOST_LOSSES:
                    continue
                error = ShardLostError(f"its process, or a shard, ended {MOST_LOSSES} times while it ran")
                row = rows.write_failure(trial, error, self._begun)
            self._hear(None, row | {"label": trial.label})
        self._read_rows()

    def _proposals(self, phase: Phase, retrained: bool) -> Proposals:
        """Those that were lost come last: one of them may have been the reason."""
        prepared, model = self.prepared, self.model
        return Proposals(
            sorted(
                prepared.remaining(phase, retrained),
                key=lambda trial: (self._lost[trial.trial_id], trial.number),
            ),
            () if retrained else phase.studies,
            prepared.space.search,
            model.identify,
            max(trial.number for trial in model.trials) + 1,
            prepared.done_rows,
            prepared.earlier,
        )


def _the_same(value: Any) -> Any:
    return value


def _phase_columns(
    space: SearchSpace, model: PreparedModel, phase: Phase, plan: ShardPlan, info: GroupInfo, runner: Runner
) -> dict[str, Any]:
    """Columns that are equal in all rows of a phase."""
    from raysweep import __version__

    return {
        "sweep": space.name,
        "dtype": model.dtype,
        "model_hash": model.model_hash,
        "calibration_hash": phase.tokens.content_hash,
        "validation_hash": None if model.validation is None else model.validation.content_hash,
        "evaluation_protocol": json.dumps(space.evaluation_protocol(), sort_keys=True),
        "raysweep_version": __version__,
        "ray_version": runner.ray_version,
        "device_name": info.device_name,
        **info.versions,
        "shards": plan.shards,
        "threads": plan.threads,
        "fallbacks": 0,
    }


def _known_results(prepared: Launch, model: PreparedModel, phase: Phase, info: GroupInfo) -> dict[str, Any]:
    """Perplexities that earlier launches found and that trials of this phase need again, by their key."""
    done = {
        trial.trial_id: trial.trial
        for trial in (*model.phases[0].trials, *phase.trials)
        if prepared.rows.get(trial.trial_id, {}).get("status") == "finished"
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
