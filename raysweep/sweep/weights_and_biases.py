"""Tune's own callback for Weights and Biases, made fit for many short trials and for clusters that were joined."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ray.air.integrations.wandb import WandbLoggerCallback, _WandbLoggingActor

from raysweep.cluster.processes import actor_here, failure_of, is_connected

OF_ONE_PROCESS = "WANDB_SERVICE"
MOST_ENDING = 2  # runs, of two processes and 200 MB each, that are still sent when another one ends
SEND_S = 60  # after the last trial


class _Process(_WandbLoggingActor):
    """The process of a run. Tune kills it once `run` is over, and what wandb writes with then has to be at its end."""

    def __init__(self, *arguments: Any, environment: Mapping[str, str], **options: Any) -> None:
        """environment: of the launch, in which the user's key may be. As an argument, because Ray writes environments
        of processes into its logs."""
        os.environ.update(environment)
        super().__init__(*arguments, **options)

    def run(self) -> None:
        super().run()
        self._wandb.teardown()


class WandbCallback(WandbLoggerCallback):
    """Each run has a process, and few are alive at once. What fails in one is raised here; Tune would say nothing."""

    _logger_actor_cls = _Process

    def __init__(self, **options: Any) -> None:
        """options: as Tune's, and those of wandb.init"""
        super().__init__(upload_timeout=SEND_S, **options)
        self._ending = set[Any]()

    def log_trial_start(self, trial: Any) -> None:
        if self._remote_logger_class is None:
            class_here = _WithSettings(actor_here(self._logger_actor_cls))
            self._remote_logger_class = class_here  # type: ignore[assignment]
        super().log_trial_start(trial)

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        self._ending.add(trial)
        super().log_trial_end(trial, failed)
        while len(self._ending) > MOST_ENDING:
            self._cleanup_logging_actors(timeout=1)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Raises TimeoutError for what has not been sent."""
        self._cleanup_logging_actors(timeout=self._upload_timeout)
        if late := len(self._trial_logging_futures):
            self._cleanup_logging_actors(kill_on_timeout=True)
            kept = "`wandb sync` sends what is kept of them"
            raise TimeoutError(f"{late} run{'s' * (late > 1)} not sent within {SEND_S} s ({kept})")

    def __del__(self) -> None:
        with suppress(Exception):  # nobody hears here what fails in a run
            super().__del__()

    def _cleanup_logging_actors(self, timeout: int = 0, kill_on_timeout: bool = False) -> None:
        if not is_connected():  # the launch has ended, and did not wait for this
            raise ConnectionError("Ray has ended")
        super()._cleanup_logging_actors(timeout, kill_on_timeout)

    def _cleanup_logging_actor(self, trial: Any) -> None:
        failure = failure_of(self._trial_logging_futures[trial])
        self._ending.discard(trial)
        super()._cleanup_logging_actor(trial)
        if failure is not None:
            raise failure


class _WithSettings:
    """Stands for the class of an actor that is handed the settings of this process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def remote(self, *arguments: Any, **options: Any) -> Any:
        return self._actor.remote(*arguments, environment=_settings(), **options)


def _settings() -> dict[str, str]:
    """What the user has set in this process's environment."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("WANDB_") and name != OF_ONE_PROCESS
    }
