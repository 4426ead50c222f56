"""The exact optimum of a matrix under its mask: least squares on Gram matrices, all rows at once."""

# O outputs, I inputs of a linear (a bias is one more input, always 1)

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raysweep.at_once import COLUMNS_AT_ONCE, column_parts
from raysweep.errors import NumericalError

NOTHING = 1e-15  # of the loss at zero change: below it a loss is rounding
MAX_ITERATIONS = 2000  # assumption: far above what trained models need, below endless
PATIENCE = 512  # iterations in float32: a Gram matrix that needs more is better seen in float64
CORRECT_AFTER = 128  # iterations: rounding would show by then


@dataclass(frozen=True)
class Quadratic:
    """Squared error of a linear's output, summed over tokens and outputs, as a function of the change D = W' - W:

    tr(D G D^T) - 2 tr(D C^T) + offset, worked out in float64.

    gram_II: G = X'^T X' of the inputs that the linear gets, float32 or float64
    cross_OI: C = (Y - X' W^T)^T X', float64, with Y what it should give; None for zero, where Y is what W itself gives
    offset:  the error at D = 0
    """

    gram_II: Tensor
    cross_OI: Tensor | None = None
    offset: float = 0.0

    def error(self, change_OI: Tensor) -> float:
        """At the change D, float64; rounding below zero is zero."""
        return self.residual(change_OI.double())[1]

    def residual(self, change_OI: Tensor) -> tuple[Tensor, float]:
        """C - D G, which is minus half the gradient, and the error at D; one product gives both.

        change_OI: float64, like the residual, which is the caller's to write to
        """
        product_OI = times_wide(change_OI, self.gram_II)
        if self.cross_OI is None:
            error = float(torch.vdot(change_OI.flatten(), product_OI.flatten()))
            return product_OI.neg_(), max(error, 0.0)
        residual_OI = torch.sub(self.cross_OI, product_OI, out=product_OI)
        both_OI = residual_OI + self.cross_OI
        error = self.offset - float(torch.vdot(change_OI.flatten(), both_OI.flatten()))
        return residual_OI, max(error, 0.0)


def times_wide(x_OI: Tensor, wide_IJ: Tensor) -> Tensor:
    """x_OI, float64, times a matrix that is large and mostly float32; float64.

    More than COLUMNS_AT_ONCE columns of it become float64 one part after another.
    """
    parts = column_parts(wide_IJ.shape[1])
    if parts == 1:
        return x_OI @ wide_IJ.double()
    product_OJ = x_OI.new_empty(x_OI.shape[0], wide_IJ.shape[1])
    for part, columns in zip(product_OJ.tensor_split(parts, 1), wide_IJ.tensor_split(parts, 1), strict=True):
        part.copy_(x_OI @ columns.double())
    return product_OJ


@dataclass(frozen=True)
class Precision:
    """In what a search iterates. Its residuals are made good by float64 ones: its pace depends on it, not its end.

    tolerance: of the loss; when an iteration lowers it by less, twice in succession, the optimum is reached
    blind:     of the scaled Gram matrix, whose diagonal is 1: what it does to a direction by less than that is rounding
    depth:     of a residual's squared length at its last correction: when it has fallen to that, it is corrected again
    stride:    iterations between two looks at the loss, each of which waits for the device
    """

    dtype: torch.dtype
    tolerance: float
    blind: float
    depth: float
    stride: int

    @classmethod
    def of(cls, device: torch.device) -> Precision:
        """float64 on CPUs, where it costs twice; on GPUs, where it costs more than that, float32."""
        return MIXED if device.type == "cuda" else DOUBLE


DOUBLE = Precision(torch.float64, tolerance=1e-10, blind=1e-14, depth=1e-20, stride=1)
MIXED = Precision(torch.float32, tolerance=1e-8, blind=1e-6, depth=1e-4, stride=8)


@dataclass(frozen=True)
class Optimum:
    """change_OI: float64;  iterations: each a product with the Gram matrix;  converged: else it was cut short"""

    change_OI: Tensor
    iterations: int
    converged: bool


def masked_least_squares(
    problem: Quadratic, free_OI: Tensor, start_OI: Tensor, precision: Precision | None = None
) -> Optimum:
    """Minimizes the quadratic over the free entries of D, by conjugate gradients preconditioned with the diagonal.

    free_OI: bool;  start_OI: where to begin, and what the other entries stay at;  precision: that of its device
    All rows are solved for at once; who has many comes with `row_pieces` of them.

    Every row is a problem of its own with step lengths of its own; one product (O, I) x (I, I) an iteration serves all.
    A Gram matrix without full rank is no obstacle: along what it does not see the weights stay where they began, so of
    several optima it is the one next to them (in the metric of the diagonal). Now and then, and always at the end, the
    residual is computed anew in float64, as a reliable update (Clark et al. 2010, arXiv 0911.3191) does it. Where the
    error has then not fallen by what the iterations promised, the Gram matrix is too near to singular for their
    precision: what they did since the last time is undone, and float64 goes on; as it does where they see nothing in a
    direction that may still matter, or have taken long.
    Raises NumericalError when numbers are not finite.
    """
    precision = Precision.of(start_OI.device) if precision is None else precision
    diagonal_I = problem.gram_II.diagonal().double()
    scale_I = torch.where(diagonal_I > 0, torch.where(diagonal_I > 0, diagonal_I, 1.0).rsqrt(), 0.0)
    scaled = _Scaled(problem.gram_II, scale_I)
    change_OI = start_OI.double()
    del start_OI  # where the caller, too, lets go of it, it takes no room beside the first change
    residual_OI, loss = problem.residual(change_OI)
    floor = NOTHING * max(_finite(loss), problem.offset)
    search = _Search(scaled, free_OI, precision)
    search.correct(residual_OI.mul_(scale_I))
    del residual_OI
    iterations, promised, last_gains = 0, 0.0, deque[float]([math.inf], maxlen=2)
    while iterations < MAX_ITERATIONS:
        gains = torch.stack([search.step() for _ in range(precision.stride)]).tolist()
        iterations += precision.stride
        promised += sum(gains)
        last_gains.extend(gains)
        calm = max(last_gains) <= precision.tolerance * max(loss - promised, 0.0) + floor or gains[-1] == 0.0
        due = calm or search.is_to_be_corrected or iterations >= MAX_ITERATIONS
        if math.isfinite(promised) and not due:
            continue
        there_OI, expected = search.taken(scale_I).add_(change_OI), search.energy
        residual_OI, loss_there = problem.residual(there_OI)
        kept = precision == DOUBLE or loss - loss_there >= promised / 2 - floor
        if kept:
            change_OI, loss = there_OI, _finite(loss_there)
        else:
            residual_OI, _ = problem.residual(change_OI)
        del there_OI
        blind = calm and search.unseen_loss > precision.tolerance * loss
        if precision != DOUBLE and (not kept or blind or iterations >= PATIENCE):
            precision, calm = DOUBLE, False
            del search  # its halves of the Gram matrix go before there is one in float64
            search = _Search(scaled, free_OI, DOUBLE)
        search.correct(residual_OI.mul_(scale_I))
        del residual_OI
        if calm and search.energy <= 2 * expected + floor:
            return Optimum(change_OI, iterations, True)
        promised = 0.0
    return Optimum(change_OI, iterations, False)


@dataclass(frozen=True)
class _Scaled:
    """A Gram matrix (I, I) with rows and columns scaled to a diagonal of ones, in float64: made where it is asked for.

    gram_II: float32 or float64;  scale_I: float64
    """

    gram_II: Tensor
    scale_I: Tensor

    def rows(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """Some of its rows, float64, new or written to `out`."""
        return torch.mul(self.gram_II[rows], self.scale_I, out=out).mul_(self.scale_I[rows, None])

    def pieces(self) -> list[slice]:
        """Rows of it that are made at once: a device that brings factors to one dtype does so for a piece."""
        inputs = len(self.scale_I)
        starts = range(0, inputs, COLUMNS_AT_ONCE)
        return [slice(start, min(start + COLUMNS_AT_ONCE, inputs)) for start in starts]


class _Search:
    """Conjugate gradients for all rows, on a Gram matrix scaled to a diagonal of ones, which is its preconditioner.

    Tensors have the dtype of its precision, sums over rows are float64.
    """

    def __init__(self, scaled: _Scaled, free_OI: Tensor, precision: Precision) -> None:
        self._free_OI, self._precision = free_OI, precision
        self._times_gram = _times_double(scaled) if precision.dtype == torch.float64 else _times(scaled)
        self._taken_OI = torch.zeros_like(free_OI, dtype=precision.dtype)
        self._residual_OI = self._direction_OI = self._taken_OI
        self._energy_O = self._energy_before_O = torch.zeros_like(self._taken_OI[:, 0])
        self._unseen_energy = torch.zeros((), dtype=torch.float64, device=free_OI.device)
        self._energy_at_correction, self._steps = 0.0, 0

    @property
    def unseen_loss(self) -> float:
        """What the error would fall by in rows whose direction is unseen, were it only just unseen."""
        return float(self._unseen_energy) / self._precision.blind

    @property
    def is_to_be_corrected(self) -> bool:
        """Whether rounding may show by now."""
        return (
            self._steps >= CORRECT_AFTER or self.energy <= self._precision.depth * self._energy_at_correction
        )

    @property
    def energy(self) -> float:
        """Squared length of the residual, over all rows; waits for the device."""
        return float(self._energy_O.double().sum())

    def correct(self, residual_OI: Tensor) -> None:
        """Replaces the residual by one that is exact, float64, of the change up to here, and goes on from there.
        It writes to what it is given.

        Rows whose residual had drifted away from it begin anew: their last direction says nothing about it.
        """
        self._residual_OI = residual_OI.mul_(self._free_OI).to(self._taken_OI)
        expected_O, self._energy_O = self._energy_O, _squares(self._residual_OI)
        self._energy_before_O = self._energy_before_O.where(self._energy_O <= 2 * expected_O, math.inf)
        self._taken_OI.zero_()
        self._energy_at_correction, self._steps = self.energy, 0

    def taken(self, scale_I: Tensor) -> Tensor:
        """The sum of steps since the last correction, scaled, float64, new.

        A correction has to follow: until then there is no residual, so that it takes no room beside the exact one.
        """
        self._residual_OI = self._taken_OI
        return self._taken_OI * scale_I

    def step(self) -> Tensor:
        """Goes to the minimum along every row's direction; by how much the error falls, float64 (), not waited for."""
        turn_O, energy_O = _divided(self._energy_O, self._energy_before_O), self._energy_O
        self._direction_OI = torch.addcmul(self._residual_OI, turn_O[:, None], self._direction_OI)
        product_OI = self._times_gram(self._direction_OI)
        curvature_O = torch.linalg.vecdot(self._direction_OI, product_OI)
        seen_O = curvature_O > self._precision.blind * _squares(self._direction_OI)
        step_O = torch.where(seen_O, _divided(energy_O, curvature_O), 0.0)
        self._unseen_energy = (energy_O.double() * ~seen_O).sum()
        self._taken_OI.addcmul_(step_O[:, None], self._direction_OI)
        self._residual_OI.addcmul_(step_O[:, None], product_OI, value=-1).mul_(self._free_OI)
        self._energy_O = _squares(self._residual_OI)
        self._energy_before_O = energy_O.where(seen_O, math.inf)  # rows whose direction is unseen begin anew
        self._steps += 1
        return (step_O.double() * energy_O.double()).sum()


def _times_double(scaled: _Scaled) -> Callable[[Tensor], Tensor]:
    """Products (O, I) x (I, I) in float64."""
    scaled_II = torch.empty_like(scaled.gram_II, dtype=torch.float64)
    for rows in scaled.pieces():
        scaled.rows(rows, out=scaled_II[rows])
    return lambda x_OI: x_OI @ scaled_II


def _times(scaled: _Scaled) -> Callable[[Tensor], Tensor]:
    """Products (O, I) x (I, I) as float32 has them, on the matrix units of a GPU, which take 16 bits at a time.

    Both factors are cut into two float16 of eleven bits each; of their four products the smallest is left out. Rows are
    brought to a length at which neither part of an entry leaves float16's range; the matrix has a diagonal of ones.
    """
    inputs, device = len(scaled.scale_I), scaled.scale_I.device
    parts_PI = torch.empty(3 * inputs, inputs, dtype=torch.float16, device=device)
    high_II, low_II, again_II = parts_PI.split(inputs)
    for rows in scaled.pieces():
        rest_RI = scaled.rows(rows)
        high_II[rows] = rest_RI
        low_II[rows] = rest_RI.sub_(high_II[rows])
    again_II.copy_(high_II)

    def product(x_OI: Tensor) -> Tensor:
        length_O = torch.linalg.vector_norm(x_OI, dim=1, keepdim=True).clamp_min(1e-30) / 256
        left_OP = _halves(x_OI / length_O)
        if x_OI.is_cuda:
            return torch.mm(left_OP, parts_PI, out_dtype=torch.float32).mul_(length_O)
        return (left_OP.float() @ parts_PI.float()).mul_(length_O)

    return product


def _halves(x_OI: Tensor) -> Tensor:
    """(O, 3 I), float16: high part, high part, and what is left of x, float32, which it is written over with."""
    outputs, inputs = x_OI.shape
    left_OP = torch.empty(outputs, 3 * inputs, dtype=torch.float16, device=x_OI.device)
    high_OI, again_OI, low_OI = left_OP.split(inputs, 1)
    high_OI.copy_(x_OI)
    again_OI.copy_(high_OI)
    low_OI.copy_(x_OI.sub_(high_OI))
    return left_OP


def _squares(x_OI: Tensor) -> Tensor:
    """(O), of every row"""
    length_O: Tensor = torch.linalg.vector_norm(x_OI, dim=1)
    return length_O.square()


def _divided(above_O: Tensor, below_O: Tensor) -> Tensor:
    """above / below; 0 for rows that are done, whose energies have vanished."""
    return torch.where(below_O > 0, above_O / torch.where(below_O > 0, below_O, 1.0), 0.0)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise NumericalError("the least squares problem of a matrix holds NaN or infinity")
    return value
