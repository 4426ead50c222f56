"""What reconstruction minimizes, and how errors are summed so that threads and shards cannot change them."""

# B samples, T tokens of a sample, H hidden (or outputs of a linear)

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def mean_squared_error(output_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """Mean over tokens and hidden units of (y' - y)^2, float32 scalar."""
    return (output_BTH.float() - target_BTH.float()).square().mean()


LOSSES: dict[str, Loss] = {"mse": mean_squared_error}


@dataclass(frozen=True)
class TextError:
    """How far a unit's output over a text is from its target.

    errors, targets: sums of squared errors and of squared targets, float64, by sample or all in one
    elements: how many numbers were compared
    """

    errors: tuple[float, ...]
    targets: tuple[float, ...]
    elements: int

    @property
    def mean(self) -> float:
        """Squared error per number."""
        return math.fsum(self.errors) / self.elements

    @property
    def relative(self) -> float:
        """Squared error over squared target."""
        return ratio(self.errors, self.targets)


def squared_sums(x_BTH: Tensor) -> list[float]:
    """Sum of squares of every sample, float64.

    A fixed tree: every token's hidden units in float32 (one thread sums one token), then tokens in float64.
    How many threads there are, and which samples share a batch, changes nothing.
    """
    tokens_BT = x_BTH.float().square().sum(-1)
    return [float(total) for total in tokens_BT.double().sum(-1).tolist()]


def ratio(errors: Iterable[float], targets: Iterable[float]) -> float:
    """Sum of squared errors over sum of squared targets; exact sums, so that the order does not matter."""
    power = math.fsum(targets)
    error = math.fsum(errors)
    return error / power if power > 0 else (0.0 if error == 0 else math.inf)
