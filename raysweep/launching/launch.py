"""A sweep from beginning to end: prepare, drop what is finished, plan, start shards, run, and leave nothing behind."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.baseline.plan import RetrainPlan
from raysweep.cluster.nodes import Node, this_node
from raysweep.config.space import SearchSpace
from raysweep.config.spaces import resolve_space
from raysweep.config.studies import Study
from raysweep.errors import UsageError
from raysweep.fingerprint import fingerprint
from raysweep.launching.progress import Progress, Silent
from raysweep.launching.retraining import Retraining, is_retrained, retrain_plan, telling
from raysweep.launching.runners import InProcess, OnRay, Runner
from raysweep.results.folders import SPACE_FILE, new_sweep_folder, storage_folder
from raysweep.results.reader import load_results, trial_rows, trial_states
from raysweep.results.state import SweepState
from raysweep.results.writer import remove_stale_temporaries, write_atomically
from raysweep.shards.group_info import GroupInfo
from raysweep.shards.plan import ShardPlan
from raysweep.shards.setup import OwnedGroup, set_up, shard_specs
from raysweep.shards.trial import DENSE_KEY, known_perplexity, pruned_key
from raysweep.sweep.identified import SweepTrial
from raysweep.sweep.planning import make_plans
from raysweep.sweep.prepare import Phase, PreparedModel, prepare
from raysweep.sweep.proposals import Chosen, Proposals, chosen_by
from raysweep.sweep.rows import RowContext

if TYPE_CHECKING:
    import pandas as pd


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


def launch(
    space: SearchSpace | str | Path,
    *,
    storage: str | Path | None = None,
    name: str | None = None,
    address: str | None = None,
    in_process: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Runs a sweep, or continues the one of that name; returns all its rows.

    space:      a search space, its YAML file, or the name of one that ships with raysweep
    storage:    folder of the results, as `--storage`;  name: instead of the space's own
    address:    of a Ray cluster, as `--address`
    in_process: without Ray, one trial after another; the numbers are the same

    Raises UsageError before anything starts or is written when the sweep cannot work. Trials that fail are rows with
    status `failed`.
    """
    progress = progress or Silent()
    loaded = _loaded(space, name)
    folder = checked_folder(loaded, storage)
    if in_process:
        _run(prepare_launch(loaded, folder, device_here(), in_process), InProcess(), progress)
    else:
        _launch_on_ray(loaded, folder, address, progress)
    return load_results(folder)


def prepare_launch(space: SearchSpace, folder: Path, device: str, in_process: bool = False) -> Launch:
    """Reads and checks everything that can be before anything starts. Raises UsageError."""
    _refuse_second_launch(folder)
    _check_scheduler(space, in_process)
    rows = trial_rows(folder) if folder.exists() else {}
    return Launch(space, folder, prepare(space, device), rows)


def _check_scheduler(space: SearchSpace, in_process: bool) -> None:
    if in_process and space.search.scheduler != "none":
        raise UsageError(
            f"search.scheduler {space.search.scheduler!r} is one of Ray Tune's, and --in-process runs without Ray",
            remedy="Leave one of them out.",
        )


def checked_folder(space: SearchSpace, storage: str | Path | None = None) -> Path:
    """The folder of the sweep, once it is sure that it can be written. Makes nothing."""
    folder = new_sweep_folder(space.name, storage_folder(storage, space.execution.storage)).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(
            f"storage {folder} cannot be written: {existing} is {'read-only' if existing.is_dir() else 'no folder'}",
            allowed="a folder that can be made and written",
            remedy="Choose another one with --storage or RAYSWEEP_STORAGE.",
        )
    return folder


def device_here() -> str:
    return "cuda" if this_node().gpus else "cpu"


def _loaded(space: SearchSpace | str | Path, name: str | None) -> SearchSpace:
    if not isinstance(space, SearchSpace):
        space = SearchSpace.from_yaml(resolve_space(str(space)))
    return space.with_name(name) if name else space


def _launch_on_ray(space: SearchSpace, folder: Path, address: str | None, progress: Progress) -> None:
    """On a cluster that is joined the nodes decide on the device, so there it is joined before all can be checked."""
    from raysweep.cluster.connect import connected, running_address

    progress.stage("Checking model and data")
    joined = running_address(address)
    prepared = prepare_launch(space, folder, device_here())
    if prepared.finished == prepared.planned:
        progress.begin(prepared.planned, prepared.finished, None, prepared.others)
        progress.end()
        return
    if joined is None:
        make_plans(prepared.models, space, [this_node()])
        for model in prepared.models:
            prepared.retrain_plan(model, [this_node()])
    progress.stage("Joining the Ray cluster" if joined else "Starting Ray on this machine")
    with connected(joined) as cluster:
        device = "cuda" if any(node.gpus for node in cluster.nodes) else "cpu"
        if device != device_here():
            prepared = prepare_launch(space, folder, device)
        _run(prepared, OnRay(cluster), progress)


def _run(prepared: Launch, runner: Runner, progress: Progress) -> None:
    if prepared.finished < prepared.planned:
        plans = make_plans(prepared.models, prepared.space, runner.nodes())
        retrain_plans = [prepared.retrain_plan(model, runner.nodes()) for model in prepared.models]
        prepared.folder.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(prepared.folder)
        write_atomically(prepared.folder / SPACE_FILE, prepared.space.resolved_yaml().encode())
        with _recorded(prepared, runner, plans[0].shards, progress) as recorder:
            for model, plan, retraining in zip(prepared.models, plans, retrain_plans, strict=True):
                _ModelRun(prepared, model, plan, retraining, runner, recorder).run()


def _refuse_second_launch(folder: Path) -> None:
    state = SweepState.read(folder) if folder.exists() else None
    here = state is not None and state.host == socket.gethostname()  # of other hosts nobody can say who lives
    if state is not None and here and state.state == "running" and state.pid != os.getpid():
        raise UsageError(
            f"the sweep {state.name!r} is running already, as process {state.pid} on {state.host}",
            remedy="Wait for it, interrupt it, or choose another --name.",
        )


class _ModelRun:
    """One model from beginning to end: trials on shards, then retraining on all devices, then the shards measure what
    came of it. A shard cannot give back its devices while it lives, so the group ends in between."""

    def __init__(
        self,
        prepared: Launch,
        model: PreparedModel,
        plan: ShardPlan,
        retrain_plan: RetrainPlan | None,
        runner: Runner,
        recorder: _Recorder,
    ) -> None:
        self.prepared, self.model, self.plan = prepared, model, plan
        self.retrain_plan, self.runner, self.recorder = retrain_plan, runner, recorder
        self.progress = recorder.progress
        steps = prepared.space.execution.checkpoint_steps
        self.retraining = Retraining(prepared.folder, model, prepared.to_retrain(model), steps)

    def run(self) -> None:
        self.retraining.forget_failures()
        self._on_shards(retrained=False)
        if self.retrain_plan is None:
            return
        if jobs := self.retraining.jobs():
            self.progress.stage(f"Starting {self.retrain_plan.workers_text} for {len(jobs)} retrainings")
            with telling(jobs, self.progress.stage):
                self.runner.retrain(jobs, self.retrain_plan, self.prepared.folder / "tune")
        self.prepared = replace(self.prepared, rows=trial_rows(self.prepared.folder))
        self._on_shards(retrained=True)
        self.retraining.clean_up(trial_states(self.prepared.folder))

    def _on_shards(self, retrained: bool) -> None:
        """The phases of the model, one after another on the same shards."""
        phases = [phase for phase in self.model.phases if self._has_work(phase, retrained)]
        if not phases:
            return
        shards = self.plan.shards
        specs = shard_specs(self.plan, self.model.source)
        self.progress.stage(f"Loading {self.model.config.path} into {shards} shard{'s' * (shards > 1)}")
        with self.runner.group(_group_name(self.prepared), specs, self.plan) as group:
            for phase in phases:
                self._phase(group, phase, retrained)
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
        info = set_up(group, self.plan.ranges, texts, granularities, model.shape, model.own_criteria)
        for key, value in _known_results(prepared, model, phase, info).items():
            group.share(key, "earlier launch", partial(_the_same, value))
        columns = _phase_columns(prepared.space, model, phase, self.plan, info, self.runner)
        rows = RowContext(prepared.folder, tuple(model.evaluation), columns)
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


class _Recorder:
    """Keeps the sweep's state file up to date while rows arrive, and tells the display."""

    def __init__(self, prepared: Launch, state: SweepState, progress: Progress) -> None:
        self._folder, self.progress = prepared.folder, progress
        self.state = state.write(self._folder)
        self._begun, self._concurrent = False, 0

    def begin(self, concurrent_trials: int) -> None:
        self._concurrent = concurrent_trials
        if not self._begun:
            self._begun = True
            self.progress.begin(
                self.state.planned, self.state.finished, self.state.dashboard, self.state.others
            )

    def row(self, row: dict[str, Any]) -> None:
        failed = row.get("status") == "failed"
        finished, failures = self.state.finished + (not failed), self.state.failed + failed
        running = min(self._concurrent, self.state.planned - finished - failures)
        counted = replace(self.state, finished=finished, failed=failures, running=running)
        self.state = counted.write(self._folder)
        self.progress.row(row)

    def end(self, state: str) -> None:
        self.state = replace(self.state, state=state, running=0).write(self._folder)
        self.progress.end()


@contextmanager
def _recorded(prepared: Launch, runner: Runner, shards: int, progress: Progress) -> Iterator[_Recorder]:
    """The state file says `running` within the context, and afterwards how it ended."""
    state = SweepState(
        prepared.space.name,
        planned=prepared.planned,
        finished=prepared.finished,
        others=prepared.others,
        shards=shards,
        dashboard=runner.dashboard,
    )
    recorder = _Recorder(prepared, state, progress)
    outcome = "failed"
    try:
        yield recorder
        outcome = "failed" if recorder.state.failed else "finished"
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise
    finally:
        recorder.end(outcome)
