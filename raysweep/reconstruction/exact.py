"""The exact optimum of a matrix under its mask: least squares on Gram matrices, all rows at once."""

# O outputs, I inputs of a linear (a bias is one more input, always 1)

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raysweep.errors import NumericalError

TOLERANCE = (
    1e-10  # of the loss: when an iteration lowers it by less, twice in succession, the optimum is reached
)
NOTHING = 1e-15  # of the loss at zero change: below it a loss is rounding
MAX_ITERATIONS = 2000  # assumption: far above what trained models need, below endless


@dataclass(frozen=True)
class Quadratic:
    """Squared error of a linear's output, summed over tokens and outputs, as a function of the change D = W' - W:

    tr(D G D^T) - 2 tr(D C^T) + offset, all float64.

    gram_II: G = X'^T X' of the inputs that the linear gets
    cross_OI: C = (Y - X' W^T)^T X', with Y what it should give; None for zero, where Y is what W itself gives
    offset:  the error at D = 0
    """

    gram_II: Tensor
    cross_OI: Tensor | None = None
    offset: float = 0.0

    def error(self, change_OI: Tensor) -> float:
        """At the change D, float64; rounding below zero is zero."""
        product_OI = change_OI.double() @ self.gram_II
        if self.cross_OI is not None:
            product_OI = product_OI - 2.0 * self.cross_OI
        return max(float((change_OI.double() * product_OI).sum()) + self.offset, 0.0)


@dataclass(frozen=True)
class Optimum:
    """change_OI: float64;  iterations: products with the Gram matrix that it took;  converged: else it was cut short"""

    change_OI: Tensor
    iterations: int
    converged: bool


def masked_least_squares(problem: Quadratic, free_OI: Tensor, start_OI: Tensor) -> Optimum:
    """Minimizes the quadratic over the free entries of D, by conjugate gradients preconditioned with the diagonal.

    free_OI: bool;  start_OI: where to begin, and what the other entries stay at

    Every row is a problem of its own with step lengths of its own; one product (O, I) x (I, I) an iteration serves all.
    A Gram matrix without full rank is no obstacle: along what it does not see the weights stay where they began, so of
    several optima it is the one next to them (in the metric of the diagonal).
    Raises NumericalError when numbers are not finite.
    """
    gram_II, change_OI = problem.gram_II, start_OI.double()
    free = free_OI.to(gram_II)
    diagonal_I = gram_II.diagonal()
    inverse_I = torch.where(diagonal_I > 0, 1.0 / torch.where(diagonal_I > 0, diagonal_I, 1.0), 0.0)
    residual_OI = (
        -(change_OI @ gram_II) if problem.cross_OI is None else problem.cross_OI - change_OI @ gram_II
    )
    residual_OI = residual_OI * free
    direction_OI = residual_OI * inverse_I
    energy_O = (residual_OI * direction_OI).sum(1)
    loss = _finite(problem.error(change_OI))
    floor, small_gains = NOTHING * max(loss, problem.offset), 0
    for iteration in range(1, MAX_ITERATIONS + 1):
        product_OI = direction_OI @ gram_II
        step_O = _divided(energy_O, (direction_OI * product_OI).sum(1))
        change_OI = change_OI + step_O[:, None] * direction_OI
        gain = _finite(float((step_O * energy_O).sum()))
        loss = max(loss - gain, 0.0)
        small_gains = small_gains + 1 if gain <= TOLERANCE * loss + floor else 0
        if small_gains == 2 or gain == 0.0:
            return Optimum(change_OI, iteration, True)
        residual_OI = residual_OI - step_O[:, None] * product_OI * free
        preconditioned_OI = residual_OI * inverse_I
        before_O, energy_O = energy_O, (residual_OI * preconditioned_OI).sum(1)
        direction_OI = preconditioned_OI + _divided(energy_O, before_O)[:, None] * direction_OI
    return Optimum(change_OI, MAX_ITERATIONS, False)


def _divided(above_O: Tensor, below_O: Tensor) -> Tensor:
    """above / below; 0 for rows that are done, whose energies have vanished."""
    return torch.where(below_O > 0, above_O / torch.where(below_O > 0, below_O, 1.0), 0.0)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise NumericalError("the least squares problem of a matrix holds NaN or infinity")
    return value
