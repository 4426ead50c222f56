"""What the steps of a trial depend on: its recipe, and the order of its samples."""

# S samples

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raysweep.config.trial import Trial
from raysweep.reconstruction.optimizer import learning_rate_factor

SEEDS = 2**63  # as many as torch's generators take


@dataclass(frozen=True)
class Step:
    """One step: the samples that it is taken on, int64, and the factor of its learning rate."""

    rows: Tensor
    factor: float


@dataclass(frozen=True)
class TrainingRecipe:
    """All that the steps of a trial depend on besides its start, inputs and targets."""

    optimizer: str
    learning_rate: float
    epochs: int
    batch_size: int
    shuffle: bool
    warmup_fraction: float
    max_grad_norm: float | None
    seed: int

    @classmethod
    def of(cls, trial: Trial) -> TrainingRecipe:
        """The recipe of a trial that takes steps, where of these fields only two can be null."""
        fields: dict[str, Any] = {name: getattr(trial, name) for name in cls.__dataclass_fields__}
        return cls(**fields | {"seed": trial.seed or 0})

    def sample_order(self, samples: int, epoch: int) -> Tensor:
        """The order of samples in one epoch, int64 (S,), fixed by the seed; without shuffling their own."""
        if not self.shuffle:
            return torch.arange(samples)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % SEEDS)
        return torch.randperm(samples, generator=generator)

    def sample_batches(self, samples: int) -> Iterator[Tensor]:
        """The samples of every step of every epoch; an epoch's last batch may be smaller, none is dropped."""
        for epoch in range(self.epochs):
            yield from self.sample_order(samples, epoch).split(self.batch_size)

    def step_count(self, samples: int) -> int:
        return self.epochs * -(-samples // self.batch_size)

    def steps(self, samples: int) -> Iterator[Step]:
        """All steps of one unit, in order."""
        total = self.step_count(samples)
        for number, rows in enumerate(self.sample_batches(samples)):
            yield Step(rows, learning_rate_factor(number, total, self.warmup_fraction))
