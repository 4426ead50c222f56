"""The inner loop: steps of a unit on batches of stored inputs and targets, and its error over a text."""

# S samples, B samples of a batch, T tokens of a sample, H hidden (or outputs of a linear)

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raysweep.config.trial import Trial
from raysweep.reconstruction.activations import batches, fetch
from raysweep.reconstruction.losses import LOSSES, TextError, squared_sums
from raysweep.reconstruction.optimizer import MaskedAdamW, learning_rate_factor

SEEDS = 2**63  # as many as torch's generators take

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TrainingRecipe:
    """All that the steps of a trial depend on besides its start, inputs and targets."""

    loss: str
    learning_rate: float
    epochs: int
    batch_size: int
    shuffle: bool
    warmup_fraction: float
    max_grad_norm: float | None
    seed: int

    @classmethod
    def of(cls, trial: Trial) -> TrainingRecipe:
        """The recipe of a trial whose recovery is reconstruct, where of these fields only two can be null."""
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


def train(
    run: Run,
    optimizer: MaskedAdamW,
    inputs_STH: Tensor,
    targets_STH: Tensor | None,
    recipe: TrainingRecipe,
    device: torch.device,
) -> int:
    """Takes the steps of `recipe` and returns their number. Without targets the output itself should be zero.

    Raises NumericalError when the weights are not finite at the end.
    """
    loss = LOSSES[recipe.loss]
    samples = inputs_STH.shape[0]
    total = recipe.step_count(samples)
    for step, rows in enumerate(recipe.sample_batches(samples)):
        output_BTH = run(fetch(inputs_STH, rows, device))
        target_BTH = torch.zeros_like(output_BTH) if targets_STH is None else fetch(targets_STH, rows, device)
        loss(output_BTH, target_BTH).backward()
        optimizer.step(learning_rate_factor(step, total, recipe.warmup_fraction))
    optimizer.check()
    return total


@torch.no_grad()
def text_error(run: Run, inputs_STH: Tensor, targets_STH: Tensor, device: torch.device) -> TextError:
    """The error of a unit's output over a whole text, in the fixed batches of a forward pass."""
    errors: list[float] = []
    powers: list[float] = []
    for rows in batches(inputs_STH.shape[0], inputs_STH.shape[1], device):
        target_BTH = fetch(targets_STH, rows, device)
        errors += squared_sums(run(fetch(inputs_STH, rows, device)).float() - target_BTH.float())
        powers += squared_sums(target_BTH)
    return TextError(tuple(errors), tuple(powers), targets_STH.numel())
