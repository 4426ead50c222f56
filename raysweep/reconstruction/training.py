"""The inner loop: steps of one unit on batches of stored inputs and targets, and its error over a whole text."""

# S samples, B samples of a batch, T tokens of a sample, H hidden (or outputs of a linear)

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from raysweep.config.trial import Trial
from raysweep.reconstruction.activations import batches, fetch
from raysweep.reconstruction.losses import LOSSES, squared_sums
from raysweep.reconstruction.optimizer import MaskedAdamW, learning_rate_factor

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TextError:
    """Squared errors and squared targets of a unit's output by sample, and the size of that output.

    errors, targets: float64 sums by sample;  elements: how many numbers were compared
    """

    errors: tuple[float, ...]
    targets: tuple[float, ...]
    elements: int


def sample_order(samples: int, epoch: int, trial: Trial) -> Tensor:
    """The order of samples in one epoch, fixed by the trial's seed; file order without shuffling."""
    if not trial.shuffle:
        return torch.arange(samples)
    generator = torch.Generator().manual_seed((trial.seed or 0) * 1_000_003 + epoch)
    return torch.randperm(samples, generator=generator)


def sample_batches(samples: int, trial: Trial) -> Iterator[Tensor]:
    """The samples of every step of every epoch; the last batch of an epoch may be smaller, none is dropped."""
    for epoch in range(trial.epochs or 1):
        yield from sample_order(samples, epoch, trial).split(trial.batch_size or 1)


def step_count(samples: int, trial: Trial) -> int:
    per_epoch = -(-samples // (trial.batch_size or 1))
    return per_epoch * (trial.epochs or 1)


def train(
    run: Run,
    optimizer: MaskedAdamW,
    inputs_STH: Tensor,
    targets_STH: Tensor | None,
    trial: Trial,
    device: torch.device,
) -> int:
    """Takes the steps of `trial` and returns their number. Without targets the loss is that of the output itself.

    Raises NumericalError when the weights are no longer finite at the end.
    """
    loss = LOSSES[trial.loss or "mse"]
    samples = inputs_STH.shape[0]
    total = step_count(samples, trial)
    for step, rows in enumerate(sample_batches(samples, trial)):
        output = run(fetch(inputs_STH, rows, device))
        target = torch.zeros_like(output) if targets_STH is None else fetch(targets_STH, rows, device)
        loss(output, target).backward()  # type: ignore[no-untyped-call]
        optimizer.step(learning_rate_factor(step, total, trial.warmup_fraction or 0.0))
    optimizer.check()
    return total


@torch.no_grad()
def text_error(run: Run, inputs_STH: Tensor, targets_STH: Tensor, device: torch.device) -> TextError:
    """The error of a unit's output over a whole text, in the fixed batches of a forward pass."""
    errors: list[float] = []
    powers: list[float] = []
    for rows in batches(inputs_STH.shape[0], inputs_STH.shape[1], device):
        target = fetch(targets_STH, rows, device)
        errors += squared_sums(run(fetch(inputs_STH, rows, device)).float() - target.float())
        powers += squared_sums(target)
    return TextError(tuple(errors), tuple(powers), targets_STH.numel())
