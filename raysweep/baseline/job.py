"""One retraining, as it travels to the workers. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raysweep.config.trial import Trial
from raysweep.model.checkpoint import ModelSource

CHECKPOINT = "checkpoint"  # within the folder of a retraining, until it is done


@dataclass(frozen=True)
class RetrainJob:
    """label: for people;  start: folder of the start weights and masks;  ids: file of token ids (samples, tokens), npy
    folder: where checkpoints and results go;  checkpoint_steps: after how many steps a checkpoint is written
    """

    label: str
    trial: Trial
    source: ModelSource
    dtype: str
    start: Path
    ids: Path
    folder: Path
    checkpoint_steps: int
