"""Recovers a matrix exactly: its least squares problem in the trial's streams, and its solution."""

# O outputs, I inputs of a linear, N tokens; S samples, T tokens of a sample

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raysweep.at_once import row_pieces, solving_bytes
from raysweep.config.trial import Trial
from raysweep.pruning.statistics import InputStatistics
from raysweep.reconstruction.activations import batches, fetch
from raysweep.reconstruction.exact import (
    Quadratic,
    masked_least_squares,
    times_wide,
)
from raysweep.reconstruction.measures import CALIBRATION, TextError
from raysweep.reconstruction.objectives import dense_linear_inputs, stream_linear_inputs
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.units import Unit

SET_ASIDE = 1 << 25  # numbers of a Gram matrix: larger ones wait on the host while another text's are in use
EXACT_ROWS = 1 << 24  # float32 holds every number of rows up to it


@dataclass(frozen=True)
class Solved:
    """What solving a unit took, as a stage says it of training. iterations: of the rows that took the most"""

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
        outputs, inputs = self.linear.weight_OI.shape
        self._pieces = row_pieces(outputs, inputs + self._has_bias)
        self._problems: dict[str, list[Quadratic]] = {}

    def solve(self) -> Solved:
        """Puts the optimum under the mask into the trial's weights; it starts at the pruned (or updated) ones."""
        weights, problems = self.blocks.weights[self.name], self.problems(CALIBRATION)
        dense_OI = self.linear.weight_OI
        mask_OI = self.blocks.layers[self.name][self.linear.name].mask.on(self.blocks.device)
        trains_bias = self._has_bias and self.trial.trainable == "all"
        weight_OI, bias_changes = torch.empty_like(dense_OI), []
        most, flops, trainable, converged = 0, 0, 0, True
        for problem, rows in zip(problems, self._pieces, strict=True):
            free_OI = mask_OI[rows]
            if self._has_bias:
                free_OI = torch.cat([free_OI, torch.full_like(free_OI[:, :1], trains_bias)], 1)
            optimum = masked_least_squares(problem, free_OI, self._change(rows))
            change_OI = optimum.change_OI[:, : mask_OI.shape[1]]
            weight_OI[rows] = (dense_OI[rows] + change_OI).mul_(mask_OI[rows])
            bias_changes.append(optimum.change_OI[:, -1].clone())
            most, converged = max(most, optimum.iterations), converged and optimum.converged
            flops += 2 * (optimum.iterations + 1) * free_OI.shape[0] * free_OI.shape[1] ** 2
            trainable += int(free_OI.sum())
            del optimum, change_OI
        weights[f"{self.linear.name}.weight"] = self.linear.as_stored(weight_OI)
        if trains_bias:
            bias_O = self._dense_bias().double() + torch.cat(bias_changes)
            weights[f"{self.linear.name}.bias"] = bias_O.to(self._dense_bias().dtype)
        return Solved(
            iterations=most,
            flops=flops,
            trainable_parameters=trainable,
            nbytes=solving_bytes(mask_OI.shape[0], mask_OI.shape[1] + self._has_bias),
            fallback=None if converged else f"stopped after {most} iterations",
        )

    def error(self, text: str) -> TextError:
        """Of the trial's weights over a text, from its Gram matrices."""
        pieces = zip(self.problems(text), self._pieces, strict=True)
        total = sum(problem.error(self._change(rows)) for problem, rows in pieces)
        power = self._power(text)
        rows = self.blocks.statistics.rows(text, self.linear, self.block)
        return TextError((total,), (power,), (total,), rows * self.linear.weight_OI.shape[0])

    def problems(self, text: str) -> list[Quadratic]:
        """The least squares problems over a text in the trial's streams, one for each piece of rows.

        Dense ones, whose Gram matrix the statistics have, are known until another text's are asked for. Others take a
        pass each, so they are kept; large ones wait on the host while another text's are in use.
        """
        if text not in self._problems:
            self._put_others_aside(text)
            self._problems[text] = (
                self._dense_problems(text) if self._is_dense else self._stream_problems(text)
            )
        elif self._problems[text][0].gram_II.device != self.blocks.device:
            self._put_others_aside(text)
            self._problems[text] = _moved(self._problems[text], self.blocks.device)
        return self._problems[text]

    def _put_others_aside(self, text: str) -> None:
        for other in self._problems.keys() - {text}:
            if self._is_dense:
                del self._problems[other]
            elif self._problems[other][0].gram_II.numel() > SET_ASIDE:
                self._problems[other] = _moved(self._problems[other], torch.device("cpu"))

    def _power(self, text: str) -> float:
        """Of what the matrix should give: dense outputs, or with local targets those for the inputs that arrive."""
        if self.trial.target_stream == "dense":
            return self.blocks.output_power(text, self.block, self.linear)
        gram_II = self.problems(text)[0].gram_II
        return sum(_quadratic(self._dense_rows(rows), gram_II) for rows in self._pieces)

    def _dense_rows(self, rows: slice) -> Tensor:
        """Of the dense weight, float64, with the bias as last column."""
        weight_OI = self.linear.weight_OI[rows].double()
        return (
            torch.cat([weight_OI, self._dense_bias()[rows].double()[:, None]], 1)
            if self._has_bias
            else weight_OI
        )

    @property
    def _is_dense(self) -> bool:
        return self.trial.input_stream == "dense"

    def _dense_problems(self, text: str) -> list[Quadratic]:
        """Their Gram matrix is that of the statistics, without a bias no copy."""
        gram_II = _augmented(self.blocks.statistics.of(text, self.linear, self.block), self._has_bias)
        return [Quadratic(gram_II) for _ in self._pieces]

    @torch.no_grad()
    def _stream_problems(self, text: str) -> list[Quadratic]:
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
            return [Quadratic(gram_II) for _ in self._pieces]
        weight_OI = self.linear.weight_OI
        offsets = [_quadratic(weight_OI[rows].double(), drift.gram_II) for rows in self._pieces]
        del drift, statistics
        if self._has_bias:
            cross_II = torch.cat([cross_II, cross_sum_I[:, None]], 1)
        return [
            Quadratic(gram_II, times_wide(weight_OI[rows].double(), cross_II), offset)
            for rows, offset in zip(self._pieces, offsets, strict=True)
        ]

    @property
    def _has_bias(self) -> bool:
        return self.linear.bias_O is not None

    def _dense_bias(self) -> Tensor:
        bias_O = self.linear.bias_O
        if bias_O is None:
            raise ValueError(f"{self.linear.name} has no bias")
        return bias_O

    def _change(self, rows: slice) -> Tensor:
        """D of rows of the trial's weights as they are, float64, with that of a bias as its last column."""
        weights = self.blocks.weights[self.name]
        weight_OI = self.linear.from_stored(weights[f"{self.linear.name}.weight"])
        change_OI = weight_OI[rows].double() - self.linear.weight_OI[rows]
        if not self._has_bias:
            return change_OI
        dense_O = self._dense_bias()
        bias_O = weights.get(f"{self.linear.name}.bias", dense_O)
        return torch.cat([change_OI, (bias_O[rows].double() - dense_O[rows].double())[:, None]], 1)


def _quadratic(x_OI: Tensor, gram_II: Tensor) -> float:
    """tr(x G x^T), float64 like x"""
    return float(times_wide(x_OI, gram_II).mul_(x_OI).sum())


def _moved(problems: list[Quadratic], device: torch.device) -> list[Quadratic]:
    """The same elsewhere; they share a Gram matrix."""
    gram_II = problems[0].gram_II.to(device)
    crosses = [None if each.cross_OI is None else each.cross_OI.to(device) for each in problems]
    return [Quadratic(gram_II, cross, each.offset) for each, cross in zip(problems, crosses, strict=True)]


def _augmented(statistics: InputStatistics, has_bias: bool) -> Tensor:
    """The Gram matrix, float32; with a bias that of the inputs and a one beside them, float64 if that has to be."""
    if not has_bias:
        return statistics.gram_II
    dtype = torch.float32 if statistics.rows <= EXACT_ROWS else torch.float64
    inputs = len(statistics.sum_I)
    gram_II = statistics.gram_II.new_empty(inputs + 1, inputs + 1, dtype=dtype)
    gram_II[:-1, :-1] = statistics.gram_II
    gram_II[-1, :-1] = gram_II[:-1, -1] = statistics.sum_I
    gram_II[-1, -1] = statistics.rows
    return gram_II
