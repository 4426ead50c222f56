"""Folders that retraining and shards exchange: start weights, what came of them, and what that took. No torch.

A start folder holds `block-<i>.safetensors` with the masks and start weights of every block, and the cost of making
them. The folder of a retraining gets the trained weights by block, its checkpoints while it runs, and what it took.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raysweep.errors import NumericalError, RaysweepError, first_line
from raysweep.results.atomic import write_atomically
from raysweep.results.folders import RETRAINING

DONE, FAILED, START, TRAINING = "done.json", "failed.json", "start.json", "training.json"


@dataclass(frozen=True)
class Retrained:
    """What a retraining took, over all workers.

    seconds: busy time of training, summed over workers;  wall_seconds: of its steps;  start_seconds: before the first
    peak_bytes: the largest of all workers
    """

    steps: int
    workers: int
    seconds: float
    wall_seconds: float
    start_seconds: float
    training_flops: int
    trainable_parameters: int
    peak_bytes: int
    loss_first: float
    loss_last: float

    @classmethod
    def read(cls, folder: Path) -> Retrained:
        """Of a retraining that is over. Raises what it failed of: NumericalError, or another RaysweepError."""
        if (failure := failure_in(folder)) is not None:
            raise failure
        return cls(**_read(folder / DONE))

    def write(self, folder: Path) -> None:
        write_json(folder / DONE, asdict(self))


@dataclass(frozen=True)
class RetrainingFolders:
    """weights: the folder of a retraining;  start: of its start weights;  tokens: that it is trained on, each once"""

    weights: Path
    start: Path
    tokens: int

    @classmethod
    def of(cls, sweep: Path, recovery_id: str, start_id: str, tokens: int) -> RetrainingFolders:
        """Within a sweep's folder. Trials with equal start weights share them."""
        place = sweep / RETRAINING
        return cls(place / recovery_id, place / f"start-{start_id}", tokens)


@dataclass(frozen=True)
class StartCost:
    """Busy seconds that masks and start weights took: as they were made, and of one trial alone.

    owner: the trial on whose account they were made
    """

    owner: str
    seconds: float
    standalone: float

    @classmethod
    def read(cls, folder: Path) -> StartCost:
        return cls(**_read(folder / START))

    def write(self, folder: Path) -> None:
        """Last of all, so that a start with a cost is complete."""
        write_json(folder / START, asdict(self))


def is_start(folder: Path) -> bool:
    """Whether all start weights are there."""
    return (folder / START).exists()


def is_over(folder: Path) -> bool:
    """Whether a retraining has ended, well or not."""
    return (folder / DONE).exists() or (folder / FAILED).exists()


def begin_training(folder: Path) -> None:
    """Says that all is ready for the first step."""
    write_json(folder / TRAINING, {})


def is_training(folder: Path) -> bool:
    """Whether its steps have begun; before that come workers, model and engine."""
    return (folder / TRAINING).exists()


def fail(folder: Path, error: Exception) -> None:
    """Says that a retraining is not to be tried again in this launch, and why."""
    reason = str(error) if isinstance(error, RaysweepError) else first_line(error)
    write_json(folder / FAILED, {"error": reason, "numerical": isinstance(error, NumericalError)})


def failure_in(folder: Path) -> RaysweepError | None:
    """Why a retraining failed; None where it did not."""
    if not (folder / FAILED).exists():
        return None
    failure = _read(folder / FAILED)
    return (NumericalError if failure.get("numerical") else RaysweepError)(str(failure["error"]))


def write_json(file: Path, content: dict[str, Any]) -> None:
    """The file is there as a whole or not at all."""
    write_atomically(file, json.dumps(content).encode())


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RaysweepError(f"{file} cannot be read: {error}") from error
    return content
