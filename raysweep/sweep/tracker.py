"""One experiment tracker: what is told to it, and the thread in which it is told.

Tune calls its callbacks between two events of a sweep, waits for them, and ends by what they raise. So each has a
thread here: it may wait for a network, and what fails there costs its tracker alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ray import tune

from raysweep.errors import first_line
from raysweep.results.folders import TENSORBOARD
from raysweep.results.schema import OPEN_PREFIXES, REAL, TRIAL_COLUMNS, WHOLE, planned_columns
from raysweep.sweep.halving import TRIAL
from raysweep.sweep.identified import LABEL_LENGTH, SweepTrial

SAY_S = 2.0  # that nobody has to be told of
TEXT_LENGTH = 500  # of one field; what older versions of MLflow take
RUNG_PREFIX = "rung_"
COUNTS = ("fallbacks", "retries")
METRICS = {
    column.name
    for column in TRIAL_COLUMNS
    if column.type in (REAL, WHOLE) and (column.group in ("quality", "cost") or column.name in COUNTS)
}

Made = AbstractContextManager[Any]  # of one of Tune's callbacks

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ShownTrial:
    """A trial as Tune's callbacks see it: what they look at, holding what people want to see.

    trial_id: Tune's, another one each time that a trial runs;  local_path: where a callback may write
    """

    trial_id: str
    name: str
    config: dict[str, Any]
    local_path: str

    @property
    def evaluated_params(self) -> dict[str, Any]:
        return self.config

    def init_local_path(self) -> None:
        Path(self.local_path).mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return self.name


class Tracker(tune.Callback):
    """Hands what Tune tells to one of its own callbacks, in a thread. Nothing that this one does raises or waits."""

    def __init__(self, name: str, made: Made, folder: Path) -> None:
        """name: of the tracker;  made: its callback, within the thread;  folder: of the sweep"""
        self.name, self._made, self._folder = name, made, folder
        self._shown: dict[str, ShownTrial] = {}
        self._calls: SimpleQueue[tuple[str, tuple[Any, ...]] | None] = SimpleQueue()
        self._done, self._is_over = 0, False
        self._thread = threading.Thread(target=self._run, name=f"raysweep {name}", daemon=True)
        self._thread.start()

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune stores its callbacks; a thread cannot be stored."""
        return tune.Callback, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if trial.trial_id not in self._shown:
            shown = self._shown[trial.trial_id] = self._show(trial.trial_id, trial.config[TRIAL])
            self._call("log_trial_start", shown)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        self.on_trial_start(iteration, trials, trial)
        self._call("log_trial_result", iteration, self._shown[trial.trial_id], metrics_of(result))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trial.trial_id, failed=(trial.last_result or {}).get("status") == "failed")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trial.trial_id, failed=True)

    def end(self) -> None:
        """Nothing more is told; trials that were not told the end of have none."""
        for trial_id in list(self._shown):
            self._end(trial_id, failed=True)
        self._calls.put(None)

    def wait(self, patience_s: float, most_s: float, tell: Callable[[str], None]) -> None:
        """Until all has been told, one thing takes longer than patience_s, or all of it longer than most_s."""
        self._thread.join(SAY_S)
        if self._thread.is_alive():
            tell(f"Waiting for {self.name} to take what it was told")
        last = time.monotonic() + most_s
        done, deadline = self._done, min(last, time.monotonic() + patience_s)
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(0.1)
            if done != self._done:
                done, deadline = self._done, min(last, time.monotonic() + patience_s)
        if self._thread.is_alive() and deadline < last:
            self._give_up(f"it has not answered for {patience_s:.0f} s")
        elif self._thread.is_alive():
            self._give_up(f"it has not taken all within {most_s:.0f} s")

    def _end(self, trial_id: str, failed: bool) -> None:
        shown = self._shown.pop(trial_id, None)
        if shown is not None:
            self._call("log_trial_end", shown, failed)

    def _call(self, name: str, *arguments: Any) -> None:
        if not self._is_over:
            self._calls.put((name, arguments))

    def _run(self) -> None:
        try:
            with self._made as callback:
                callback.setup()
                while (call := self._calls.get()) is not None and not self._is_over:
                    name, arguments = call
                    getattr(callback, name)(*arguments)
                    self._done += 1
                if not self._is_over:
                    callback.on_experiment_end([])
        except Exception as error:  # of packages that are not ours, and networks
            self._give_up(first_line(error))

    def _give_up(self, why: str) -> None:
        if not self._is_over:
            self._is_over = True
            log.warning("nothing more is told to %s: %s; no row is lost", self.name, why)

    def _show(self, trial_id: str, trial: SweepTrial) -> ShownTrial:
        path = self._folder / TENSORBOARD / trial.file_name if self.name == "tensorboard" else self._folder
        return ShownTrial(trial_id, trial.label[:LABEL_LENGTH], fields_of(trial), str(path))


def fields_of(trial: SweepTrial) -> dict[str, Any]:
    """What is known of a trial before it runs: its parameters in a tracker."""
    identities = {"trial_id": trial.trial_id, "recovery_id": trial.recovery_id, "study": trial.study}
    known = planned_columns(trial.planned) | identities
    return {
        name: value[:TEXT_LENGTH] if isinstance(value, str) else value
        for name, value in known.items()
        if value is not None
    }


def metrics_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """A row, or what is known at a rung, as Tune's callbacks take it: numbers, and how it ended as a parameter.

    A rung's value is of a model that is partly dense, so that it has a name of its own: among those of whole models it
    would come out best.
    """
    is_row = "status" in result
    prefix = "" if is_row else RUNG_PREFIX
    found: dict[str, Any] = {
        f"{prefix}{name}": value
        for name, value in result.items()
        if (name in METRICS or name.startswith(OPEN_PREFIXES)) and isinstance(value, int | float)
    }
    if is_row:
        found["config"] = {name: result[name] for name in ("status", "error") if name in result}
    return found | {"training_iteration": result["training_iteration"]}
