"""Recovers a matrix exactly: its least squares problem in the trial's streams, and its solution."""

# O outputs, I inputs of a linear, N tokens; S samples, T tokens of a sample

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raysweep.config.trial import Trial
from raysweep.pruning.statistics import InputStatistics
from raysweep.reconstruction.activations import batches, fetch
from raysweep.reconstruction.exact import DOUBLE, Optimum, Precision, Quadratic, masked_least_squares
from raysweep.reconstruction.measures import CALIBRATION, TextError
from raysweep.reconstruction.objectives import dense_linear_inputs, stream_linear_inputs
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.units import Unit


@dataclass(frozen=True)
class Solved:
    """What solving a unit took, as a stage says it of training."""

    iterations: int
    flops: int
    trainable_parameters: int
    nbytes: int
    fallback: str | None


class Solver:
    """One matrix of a trial. Made while its block is dense."""

    def __init__(self, blocks: BlockRange, name: str, trial: Trial, unit: Unit) -> None:
        if unit.linear is None:
            raise ValueError("only a matrix can be solved")
        self.blocks, self.name, self.trial = blocks, name, trial
        self.block, self.linear = unit.block, unit.linear
        self._problems: dict[str, Quadratic] = {}

    def solve(self) -> Solved:
        """Puts the optimum under the mask into the trial's weights; it starts at the pruned (or updated) ones."""
        weights, problem = self.blocks.weights[self.name], self.problem(CALIBRATION)
        mask_OI = self.blocks.layers[self.name][self.linear.name].mask_OI.to(self.blocks.device)
        has_bias = self.linear.bias_O is not None
        free_OI = mask_OI
        if has_bias:
            bias_free = torch.full_like(mask_OI[:, :1], self.trial.trainable == "all")
            free_OI = torch.cat([mask_OI, bias_free], 1)
        optimum = masked_least_squares(problem, free_OI, self._change())
        change_OI = optimum.change_OI[:, : mask_OI.shape[1]]
        weight_OI = (self.linear.weight_OI.double() + change_OI) * mask_OI
        weights[f"{self.linear.name}.weight"] = self.linear.as_stored(
            weight_OI.to(self.linear.weight_OI.dtype)
        )
        if has_bias and self.trial.trainable == "all":
            bias_O = self._dense_bias().double() + optimum.change_OI[:, -1]
            weights[f"{self.linear.name}.bias"] = bias_O.to(self._dense_bias().dtype)
        return self._solved(optimum, free_OI)

    def error(self, text: str) -> TextError:
        """Of the trial's weights over a text, from its Gram matrices."""
        total = self.problem(text).error(self._change())
        power = self._power(text)
        rows = self.blocks.statistics(text, self.linear, self.block).rows
        return TextError((total,), (power,), (total,), rows * self.linear.weight_OI.shape[0])

    def problem(self, text: str) -> Quadratic:
        """The least squares problem over a text in the trial's streams."""
        if text not in self._problems:
            self._problems[text] = self._dense_problem(text) if self._is_dense else self._stream_problem(text)
        return self._problems[text]

    def _power(self, text: str) -> float:
        """Of what the matrix should give: dense outputs, or with local targets those for the inputs that arrive."""
        if self.trial.target_stream == "dense":
            return self.blocks.output_power(text, self.block, self.linear)
        weight_OI = self.linear.weight_OI.double()
        if self._has_bias:
            weight_OI = torch.cat([weight_OI, self._dense_bias().double()[:, None]], 1)
        return float(((weight_OI @ self.problem(text).gram_II) * weight_OI).sum())

    @property
    def _is_dense(self) -> bool:
        return self.trial.input_stream == "dense"

    def _dense_problem(self, text: str) -> Quadratic:
        """Its Gram matrix is that of the statistics."""
        return Quadratic(_augmented(self.blocks.statistics(text, self.linear, self.block), self._has_bias))

    @torch.no_grad()
    def _stream_problem(self, text: str) -> Quadratic:
        """One pass over the inputs X' that arrive, and the dense ones X where these are what the targets come from.

        With dense targets C = W (X - X')^T X' and the offset is tr(W (X - X')^T (X - X') W^T); a bias cancels in both.
        """
        now_STI = stream_linear_inputs(self.blocks, self.name, text, self.block, self.linear)
        to_dense = self.trial.target_stream == "dense"
        dense_STI = dense_linear_inputs(self.blocks, text, self.block, self.linear) if to_dense else None
        inputs, device = now_STI.shape[2], self.blocks.device
        statistics = InputStatistics.empty(inputs, device)
        drift, cross_II = InputStatistics.empty(inputs, device), torch.zeros(inputs, inputs, device=device)
        cross_sum_I = torch.zeros(inputs, device=device)
        for rows in batches(now_STI.shape[0], now_STI.shape[1], device):
            now_NI = fetch(now_STI, rows, device).flatten(0, 1)
            statistics.add(now_NI)
            if dense_STI is not None:
                drift_NI = fetch(dense_STI, rows, device).flatten(0, 1).float() - now_NI.float()
                drift.add(drift_NI)
                cross_II += drift_NI.T @ now_NI.float()
                cross_sum_I += drift_NI.sum(0)
        gram_II = _augmented(statistics, self._has_bias)
        if dense_STI is None:
            return Quadratic(gram_II)
        weight_OI = self.linear.weight_OI.double()
        if self._has_bias:
            cross_II = torch.cat([cross_II, cross_sum_I[:, None]], 1)
        offset = float(((weight_OI @ drift.gram_II.double()) * weight_OI).sum())
        return Quadratic(gram_II, weight_OI @ cross_II.double(), offset)

    @property
    def _has_bias(self) -> bool:
        return self.linear.bias_O is not None

    def _dense_bias(self) -> Tensor:
        bias_O = self.linear.bias_O
        if bias_O is None:
            raise ValueError(f"{self.linear.name} has no bias")
        return bias_O

    def _change(self) -> Tensor:
        """D of the trial's weights as they are, float64, with that of a bias as its last column."""
        weights = self.blocks.weights[self.name]
        weight_OI = self.linear.from_stored(weights[f"{self.linear.name}.weight"])
        change_OI = weight_OI.double() - self.linear.weight_OI.double()
        if not self._has_bias:
            return change_OI
        dense_O = self._dense_bias()
        bias_O = weights.get(f"{self.linear.name}.bias", dense_O)
        return torch.cat([change_OI, (bias_O.double() - dense_O.double())[:, None]], 1)

    def _solved(self, optimum: Optimum, free_OI: Tensor) -> Solved:
        outputs, inputs = free_OI.shape
        cut_short = None if optimum.converged else f"stopped after {optimum.iterations} iterations"
        return Solved(
            iterations=optimum.iterations,
            flops=2 * (optimum.iterations + 1) * outputs * inputs**2,
            trainable_parameters=int(free_OI.sum()),
            nbytes=solving_bytes(outputs, inputs, Precision.of(free_OI.device)),
            fallback=cut_short,
        )


def solving_bytes(outputs: int, inputs: int, precision: Precision) -> int:
    """In float64 the Gram matrix as it is and scaled, and seven of the weight's shape; with float32 iterations also the
    scaled one's halves, one of which is at first in float64."""
    halves = 0 if precision == DOUBLE else 12
    return (16 + halves) * inputs**2 + 56 * outputs * inputs


def _augmented(statistics: InputStatistics, has_bias: bool) -> Tensor:
    """The Gram matrix, float64; with a bias that of the inputs and a one beside them."""
    gram_II = statistics.gram_II.double()
    if not has_bias:
        return gram_II
    sum_I = statistics.sum_I.double()
    corner = torch.full((1, 1), float(statistics.rows), dtype=torch.float64, device=gram_II.device)
    return torch.cat([torch.cat([gram_II, sum_I[:, None]], 1), torch.cat([sum_I[None], corner], 1)], 0)
