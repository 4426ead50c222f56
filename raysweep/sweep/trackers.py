"""The experiment trackers that there are, by Tune's own callbacks, and what they need."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from ray import tune

from raysweep.errors import UsageError, first_line
from raysweep.results.folders import MLFLOW
from raysweep.sweep.tracker import Made, Tracker

PATIENCE_S = 90.0  # for one thing to be told, once the last trial is done; more than wandb's own 60 s
MOST_S = 900.0  # for all that is still to be told then; assumption
LEAVE_S = 5.0  # the same where the sweep is interrupted


@dataclass(frozen=True)
class Kind:
    """A kind of tracker.

    module, package: that it needs, and what to install for it
    made: its callback, of the sweep's folder and name
    mend: what to do where it cannot begin
    """

    module: str
    package: str
    made: Callable[[Path, str], Made]
    mend: str


@contextmanager
def tracking(
    names: Iterable[str], folder: Path, sweep: str, tell: Callable[[str], None]
) -> Iterator[list[tune.Callback]]:
    """Callbacks for Tune, for as many experiments as there are within the context. At its end trackers get the time to
    send what they have.

    names: of trackers;  folder, sweep: of the sweep, and its name;  tell: says what is waited for
    """
    trackers = [Tracker(name, KINDS[name].made(folder, sweep), folder) for name in names]
    patience_s = most_s = LEAVE_S
    try:
        yield list(trackers)
        patience_s, most_s = PATIENCE_S, MOST_S
    finally:
        for tracker in trackers:
            tracker.end()
        for tracker in trackers:
            tracker.wait(patience_s, most_s, tell)


def check_trackers(names: Iterable[str]) -> None:
    """Raises UsageError for a tracker whose package is missing, or that cannot begin."""
    for name in names:
        kind = KINDS[name]
        if find_spec(kind.module) is None:
            raise UsageError(
                f"tracker {name!r} needs the package {kind.package}, which is not installed",
                remedy=f"pip install {kind.package}, or leave it out of execution.trackers.",
            )
        try:
            with TemporaryDirectory() as folder, kind.made(Path(folder), name) as callback:
                if name == "wandb":  # looks for a key, and sends nothing
                    callback.setup()
        except Exception as error:  # of packages that are not ours
            raise UsageError(
                f"tracker {name!r} cannot begin: {first_line(error).split('. ')[0]}",
                remedy=f"{kind.mend}, or leave it out of execution.trackers.",
            ) from error


@contextmanager
def _tensorboard(folder: Path, sweep: str) -> Iterator[Any]:
    from ray.tune.logger import TBXLoggerCallback

    yield TBXLoggerCallback()


@contextmanager
def _mlflow(folder: Path, sweep: str) -> Iterator[Any]:
    """Where MLFLOW_TRACKING_URI says, or into a database in the sweep's folder. Tune's callback sets what is the whole
    process's; it is afterwards what it was."""
    import mlflow
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    logging.getLogger("mlflow.store").setLevel(logging.WARNING)  # tells at length of the tables that it makes
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    place = folder / MLFLOW
    if before is None:
        place.mkdir(exist_ok=True)
    uri = before or f"sqlite:///{quote(str(place))}/mlflow.db"
    try:
        yield MLflowLoggerCallback(uri, experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME") or sweep)
    finally:
        mlflow.set_tracking_uri(None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


@contextmanager
def _wandb(folder: Path, sweep: str) -> Iterator[Any]:
    from raysweep.sweep.weights_and_biases import WandbCallback

    yield WandbCallback(
        project=os.environ.get("WANDB_PROJECT") or sweep,
        group=os.environ.get("WANDB_RUN_GROUP") or sweep,
        dir=os.path.abspath(os.environ.get("WANDB_DIR") or folder),
    )


KINDS = {
    "tensorboard": Kind("tensorboardX", "tensorboardX", _tensorboard, "Install another tensorboardX"),
    "mlflow": Kind("mlflow", "mlflow-skinny", _mlflow, "Install another mlflow"),
    "wandb": Kind("wandb", "wandb", _wandb, "Use `wandb login`, WANDB_API_KEY or WANDB_MODE=offline"),
}
