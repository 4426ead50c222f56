"""Runs the trials of one phase through Ray Tune. A trial's process holds a sliver of a CPU and imports no torch."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysweep.importing import without_collecting

with without_collecting():  # in every process of a trial, before the first one can begin
    from ray import tune
    from ray.tune.search import Searcher

from raysweep.config.sections import SearchConfig
from raysweep.errors import StorageError
from raysweep.shards.group import RayGroup
from raysweep.shards.group_info import TRIAL_CPUS, GroupInfo
from raysweep.shards.outcome import Rung
from raysweep.sweep.halving import SIXTEENTHS, TIME, TRIAL, CellHalving, rungs_of
from raysweep.sweep.identified import SweepTrial
from raysweep.sweep.proposals import Proposals
from raysweep.sweep.rows import RowContext, plain, run_in_steps

REPLICA = "replica"
START_LIMIT_S = 60.0  # for the processes of trials; then trials end without the others


@dataclass(frozen=True)
class PhaseContext:
    """What the processes of a phase's trials share; sent to each once.

    here: the resource that pins them to a node;  processes: how many there will be, over how many replicas
    """

    group_name: str
    here: str
    info: GroupInfo
    rows: RowContext
    search: SearchConfig
    processes: int
    replicas: int = 1


class SweepTrainable(tune.Trainable):
    """One trial of a sweep to Tune, a step for every rung and one for the end. Its process is used again."""

    def setup(self, config: dict[str, Any], context: PhaseContext) -> None:  # type: ignore[override]
        self._context = context
        self._trial: SweepTrial = config[TRIAL]
        self._group = RayGroup.join(context.group_name, context.info, config[REPLICA])
        self._is_new = True
        self._steps: Iterator[Rung | dict[str, Any]] | None = None

    def step(self) -> dict[str, Any]:
        if (
            self._is_new
        ):  # here and not in `setup`, after which Tune has yet to hear that the process is there
            self._group.arrive(str(os.getpid()))
        if self._steps is None:
            rungs = rungs_of(self._context.search)
            self._steps = run_in_steps(self._group, self._trial, self._context.rows, rungs)
        found = next(self._steps)
        if self._is_new:
            # A trial that ended while others wait for their processes would hand them its own. Theirs would be given up
            # half started, the next trial would ask for another, and so on: a start of seconds for every trial.
            self._group.wait_for_others(str(os.getpid()), self._context.processes, START_LIMIT_S)
            self._is_new = False
        if isinstance(found, Rung):
            return {TIME: SIXTEENTHS[found.number], self._context.search.metric: found.value, "done": False}
        self._steps = None
        return plain(found) | {"done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._trial = new_config[TRIAL]
        return True

    def cleanup(self) -> None:
        """Ends a trial that the scheduler stopped at a rung: its row says so, and the shards forget it."""
        if self._steps is not None:
            self._steps.close()  # type: ignore[attr-defined]
            self._steps = None


class _Suggestions(Searcher):
    """Hands Tune the trials that are proposed, and the proposals what came of them.

    A process stays with the replica of its first trial; with one after another each replica has as many processes.
    """

    def __init__(self, proposals: Proposals, search: SearchConfig, replicas: int) -> None:
        super().__init__(metric=search.metric, mode=search.mode)
        self._proposals = proposals
        self._replicas = itertools.cycle(range(replicas))
        self._open: dict[str, SweepTrial] = {}

    def suggest(self, trial_id: str) -> Any:
        trial = self._proposals.next()
        if trial is None:
            return Searcher.FINISHED
        self._open[trial_id] = trial
        return {TRIAL: trial, REPLICA: next(self._replicas)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        trial = self._open.pop(trial_id, None)
        if trial is not None:
            self._proposals.done(trial, None if error or result is None else {"status": "stopped"} | result)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: rows are the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


def run_phase(
    context: PhaseContext,
    proposals: Proposals,
    concurrent_trials: int,
    storage: Path,
    name: str,
    on_row: Callable[[dict[str, Any]], None],
    on_lost: Callable[[str, int], None],
    trackers: Sequence[tune.Callback] = (),
) -> list[SweepTrial]:
    """Runs what is proposed to the end, oldest first; `on_row` hears of every trial that is done, `on_lost` of the id
    and the number of one that ended without a word: its process, or one of its shards, is gone. Then nothing new
    begins. Returns those trials. Raises StorageError when rows cannot be written.

    storage, name: Tune keeps its own state in storage/name.
    trackers: that are told of trials as well
    """
    if not proposals.total:
        return []
    _quiet_tune()
    _share_environment()
    lost: list[SweepTrial] = []
    causes: list[BaseException | None] = []

    def note_loss(trial: SweepTrial, cause: BaseException | None) -> None:
        lost.append(trial)
        causes.append(cause)
        proposals.end()
        on_lost(trial.trial_id, trial.number)

    run = tune.RunConfig(
        name=name,
        storage_path=str(storage),
        callbacks=[_Listener(on_row, note_loss), *trackers],
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        verbose=0,
    )
    _tuner(context, proposals, concurrent_trials, run).fit()
    for cause in causes:
        if isinstance(cause, StorageError):
            raise cause
    return lost


def _tuner(
    context: PhaseContext, proposals: Proposals, concurrent_trials: int, run: tune.RunConfig
) -> tune.Tuner:
    # Trials write their rows themselves, so their processes stay on the node that the storage was checked on.
    resources = {"CPU": TRIAL_CPUS, context.here: TRIAL_CPUS}
    trainable = tune.with_resources(
        tune.with_parameters(SweepTrainable, context=context), resources=resources
    )
    trainable.__qualname__ = "SweepTrial"  # what Ray's dashboard calls its actors
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_Suggestions(proposals, context.search, context.replicas),
            scheduler=CellHalving(context.search, proposals.rows)
            if context.search.scheduler == "asha"
            else None,
            num_samples=proposals.total,
            max_concurrent_trials=concurrent_trials,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config[TRIAL].file_name,
            trial_dirname_creator=lambda trial: trial.config[TRIAL].trial_id,
        ),
        run_config=run,
    )


class _Listener(tune.Callback):
    """Hands finished trials to the display of the launching process."""

    def __init__(
        self,
        on_row: Callable[[dict[str, Any]], None],
        on_lost: Callable[[SweepTrial, BaseException | None], None],
    ) -> None:
        self._on_row, self._on_lost = on_row, on_lost

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune stores its callbacks; a display cannot be stored, and a restored one would have nobody to tell."""
        return _Listener, (_nobody, _nobody)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A result without a status is that of a rung at which the scheduler stopped the trial."""
        planned: SweepTrial = trial.config[TRIAL]
        stopped = {"status": "stopped", "label": planned.label}
        self._on_row(stopped | trial.last_result | {"trial_id": planned.trial_id})  # Tune puts its own there

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Its own failures are rows: this is one whose process, or one of whose shards, is gone."""
        self._on_lost(trial.config[TRIAL], _cause_of(trial))


def _cause_of(trial: Any) -> BaseException | None:
    """What a trial raised, as far as Tune has kept it: on this machine, since the storage may be what failed."""
    try:
        with open(trial.pickled_error_file, "rb") as stream:
            error = pickle.load(stream)  # what Tune has just written
    except (OSError, TypeError, EOFError, AttributeError, ImportError, pickle.UnpicklingError):
        return None
    cause: BaseException | None = getattr(error, "cause", error)
    return cause


def _nobody(*_: Any) -> None:
    """Hears nothing."""


def _quiet_tune() -> None:
    """Rows are the record: Tune's per-trial loggers, its own Ctrl-C handling and its warnings are switched off."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it looks for result files that rows replace
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # the row of a failed trial has no metric
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "0"
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "30")


def _share_environment() -> None:
    """Processes of trials begin as all others of the cluster. With an environment of their own, for a variable that
    Tune sets for PyTorch Lightning, each would begin twice: Ray prepares it in one Python, and hands over to another.
    """
    with suppress(ImportError):  # in another version of Ray, where they only begin later
        from ray.tune.execution.class_cache import DEFAULT_ENV_VARS

        DEFAULT_ENV_VARS.pop("PL_DISABLE_FORK", None)
