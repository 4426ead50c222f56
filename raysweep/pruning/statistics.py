"""Second moments and sums of a layer's inputs over a text, which can be merged, and errors from them."""

# O outputs, I inputs of the layer, N rows (samples * tokens)

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from raysweep.at_once import COLUMNS_AT_ONCE


@dataclass
class InputStatistics:
    """Sums over the rows x of a layer's input, enough for every criterion and for the error of its output.

    gram_II: float32 (I, I), sum of x x^T;  sum_I: float32 (I,), sum of x;  rows: how many.
    Sums, not means, so that the statistics of two parts add up to those of the whole.
    """

    gram_II: Tensor
    sum_I: Tensor
    rows: int

    @classmethod
    def empty(cls, inputs: int, device: torch.device | str = "cpu") -> InputStatistics:
        """The statistics of no rows."""
        return cls(torch.zeros(inputs, inputs, device=device), torch.zeros(inputs, device=device), 0)

    def add(self, x_NI: Tensor) -> None:
        """Adds the rows `x_NI` (any floating dtype; products are accumulated in float32)."""
        if x_NI.is_cuda and x_NI.dtype in (torch.bfloat16, torch.float16):
            # The product adds to what is there; a product of its own and a sum would move the matrix three times more.
            torch.addmm(self.gram_II, x_NI.T, x_NI, out_dtype=torch.float32, out=self.gram_II)
        else:
            wide_NI = x_NI.float()
            self.gram_II.add_(wide_NI.T @ wide_NI)
        self.sum_I.add_(x_NI.sum(0, dtype=torch.float32))
        self.rows += x_NI.shape[0]

    def moved(self, move: Callable[[Tensor], Tensor]) -> InputStatistics:
        """The same with its tensors elsewhere."""
        return InputStatistics(move(self.gram_II), move(self.sum_I), self.rows)

    @property
    def mean_square_I(self) -> Tensor:
        """Mean of x_j^2 over the rows, float32 (I,)."""
        return self.gram_II.diagonal() / max(self.rows, 1)

    @property
    def norm_I(self) -> Tensor:
        """Root mean square of every input: Wanda's ||X_j||_2 (arXiv 2306.11695) up to a common factor."""
        return self.mean_square_I.sqrt()

    @property
    def dead_inputs(self) -> int:
        """Inputs that were zero on every row. Their weights are not dead: other data may use them."""
        return int((self.gram_II.diagonal() == 0).sum())


def alike(inputs: int, device: torch.device | str = "cpu") -> InputStatistics:
    """The statistics of inputs of which nothing is known: all as large, none with another. Under them Wanda and
    SparseGPT rank by magnitude, and SparseGPT moves no weight."""
    return InputStatistics(torch.eye(inputs, device=device), torch.zeros(inputs, device=device), 1)


def merge(parts: Iterable[InputStatistics]) -> InputStatistics:
    """The statistics of all rows of `parts` together. Raises ValueError when there are none."""
    parts = list(parts)
    if not parts:
        raise ValueError("no statistics to merge")
    gram_II = torch.stack([part.gram_II for part in parts]).sum(0)
    sum_I = torch.stack([part.sum_I for part in parts]).sum(0)
    return InputStatistics(gram_II, sum_I, sum(part.rows for part in parts))


def output_error(statistics: InputStatistics, delta_OI: Tensor, delta_bias_O: Tensor | None = None) -> float:
    """Squared change of a layer's output over rows and outputs when weight and bias change by the deltas.

    sum_n ||D x_n + d||^2 = tr(D G D^T) + 2 d . (D s) + N d . d  with G and s of `statistics`, in float64.
    """
    delta = delta_OI.double()
    grams, deltas = statistics.gram_II.split(COLUMNS_AT_ONCE, 1), delta.split(COLUMNS_AT_ONCE, 1)
    parts = [((delta @ gram.double()) * part).sum() for gram, part in zip(grams, deltas, strict=True)]
    error = torch.stack(parts).sum()
    if delta_bias_O is not None:
        bias = delta_bias_O.double()
        error = error + 2 * (bias * (delta @ statistics.sum_I.double())).sum()
        error = error + statistics.rows * (bias @ bias)
    return max(float(error), 0.0)  # rounding can make an error of nearly nothing negative
