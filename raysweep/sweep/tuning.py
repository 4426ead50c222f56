"""Runs the trials of one phase through Ray Tune. A trial's process holds a sliver of a CPU and imports no torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from raysweep.shards.group import RayGroup
from raysweep.shards.group_info import TRIAL_CPUS, GroupInfo
from raysweep.sweep.identified import SweepTrial
from raysweep.sweep.rows import RowContext, plain, run_and_write

NUMBER = "trial"


@dataclass(frozen=True)
class PhaseContext:
    """What the processes of a phase's trials share; sent to each once. here: the resource that pins them to a node."""

    group_name: str
    here: str
    info: GroupInfo
    rows: RowContext
    trials: dict[int, SweepTrial]


class SweepTrainable(tune.Trainable):
    """One trial of a sweep to Tune. Its process is used again for the next trial."""

    def setup(self, config: dict[str, Any], context: PhaseContext) -> None:  # type: ignore[override]
        self._context = context
        self._number: int = config[NUMBER]
        self._group = RayGroup.join(context.group_name, context.info)

    def step(self) -> dict[str, Any]:
        trial = self._context.trials[self._number]
        row = run_and_write(self._group, trial, self._context.rows)
        return plain(row) | {"done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._number = new_config[NUMBER]
        return True


def run_phase(
    context: PhaseContext,
    trials: Sequence[SweepTrial],
    concurrent_trials: int,
    storage: Path,
    name: str,
    on_row: Callable[[dict[str, Any]], None],
    on_lost: Callable[[str], None],
) -> None:
    """Runs `trials` to the end, oldest first; `on_row` hears of every one that is done, `on_lost` of the id of one
    whose process is gone.

    storage, name: Tune keeps its own state in storage/name.
    """
    _quiet_tune()
    # Trials write their rows themselves, so their processes stay on the node that the storage was checked on.
    resources = {"CPU": TRIAL_CPUS, context.here: TRIAL_CPUS}
    trainable = tune.with_resources(
        tune.with_parameters(SweepTrainable, context=context), resources=resources
    )
    tuner = tune.Tuner(
        trainable,
        param_space={NUMBER: tune.grid_search([trial.number for trial in trials])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=concurrent_trials,
            reuse_actors=True,
            trial_name_creator=lambda trial: _trial_name(context, trial),
            trial_dirname_creator=lambda trial: context.trials[trial.config[NUMBER]].trial_id,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(storage),
            callbacks=[_Listener(on_row, lambda number: on_lost(context.trials[number].trial_id))],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    tuner.fit()


def _trial_name(context: PhaseContext, trial: Any) -> str:
    planned = context.trials[trial.config[NUMBER]]
    return f"{planned.label.replace(' ', '_').replace('/', '-')}_{planned.trial_id[:6]}"


class _Listener(tune.Callback):
    """Hands finished trials to the display of the launching process."""

    def __init__(self, on_row: Callable[[dict[str, Any]], None], on_lost: Callable[[int], None]) -> None:
        self._on_row, self._on_lost = on_row, on_lost

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune stores its callbacks; a display cannot be stored, and a restored one would have nobody to tell."""
        return _Listener, (_nobody, _nobody)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        self._on_row(result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._on_lost(trial.config[NUMBER])
        self._on_row({"status": "failed", "label": str(trial), "error": "the process of the trial ended"})


def _nobody(_: Any) -> None:
    """Hears nothing."""


def _quiet_tune() -> None:
    """Rows are the record: Tune's per-trial loggers, its own Ctrl-C handling and its warnings are switched off."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it looks for result files that rows replace
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "0"
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "30")
