"""SparseGPT (arXiv 2301.00774): weights go column by column, and the columns after each make up for its error."""

# O outputs, I inputs of a layer, C columns of one block

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raysweep.errors import NumericalError
from raysweep.pruning.masks import keep_all_but_lowest, keep_n_of_m
from raysweep.pruning.rules import MaskRule, check_n_of_m
from raysweep.pruning.statistics import InputStatistics
from raysweep.pruning.threads import one_thread

COLUMN_BLOCK = 128  # of the paper: how many columns share one choice of what goes
DAMPENING_GROWTH = 10.0  # when a Gram matrix cannot be factorized
DAMPENING_LIMIT = 1.0  # of the mean diagonal: beyond it little would be left of the matrix


@dataclass(frozen=True)
class InverseFactor:
    """upper_II: float32 (I, I), the upper Cholesky factor U of the inverse of the damped Gram matrix, H^-1 = U^T U.

    dead_I: bool, inputs that were never active: nothing is known of their weights, which go first
    dampening: that was used, as a share of the mean diagonal;  fallback: what was done beyond what was asked, or None
    """

    upper_II: Tensor
    dead_I: Tensor
    dampening: float
    fallback: str | None

    def to(self, device: torch.device | str) -> InverseFactor:
        """The same on a device."""
        return replace(self, upper_II=self.upper_II.to(device), dead_I=self.dead_I.to(device))


def inverse_factor(statistics: InputStatistics, dampening: float) -> InverseFactor:
    """Factorizes the Gram matrix with `dampening` times its mean diagonal added to the diagonal, in float64.

    A matrix that is not positive definite then gets ten times the dampening, and again up to the mean diagonal
    itself. Raises NumericalError when it is not finite, is zero, or cannot be factorized even so.
    """
    gram_II = statistics.gram_II.double()
    scale = float(gram_II.diagonal().mean())
    if not bool(torch.isfinite(gram_II).all()) or scale <= 0:
        raise NumericalError(
            f"the Gram matrix has mean diagonal {scale:g}, so SparseGPT has nothing to work with"
        )
    gram_II = gram_II / scale
    tried = dampening
    while True:
        upper_II = _factorized(gram_II, tried)
        if upper_II is not None:
            fallback = None if tried == dampening else f"dampening {tried:g} instead of {dampening:g}"
            return InverseFactor(upper_II.float(), gram_II.diagonal() == 0, tried, fallback)
        if tried >= DAMPENING_LIMIT:
            raise NumericalError(
                f"the Gram matrix is not positive definite, even with dampening {tried:g}: use more calibration tokens"
            )
        tried = min(DAMPENING_LIMIT, max(tried * DAMPENING_GROWTH, 1e-6))


def _factorized(gram_II: Tensor, dampening: float) -> Tensor | None:
    """U of a Gram matrix with mean diagonal 1, float64; None where it is not positive definite."""
    damped_II = gram_II.clone()
    damped_II.diagonal().add_(dampening)
    with one_thread(gram_II.device):
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        if failed:
            return None
        upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
    return upper_II if not failed and bool(torch.isfinite(upper_II).all()) else None


def sparsegpt(
    weight_OI: Tensor, factor: InverseFactor, rule: MaskRule, column_block: int = COLUMN_BLOCK
) -> tuple[Tensor, Tensor]:
    """The mask (O, I), bool, True = kept, and the updated weights (O, I), float32, with exact zeros.

    In blocks of `column_block` columns the lowest W^2 / diag(U)^2 go: `int(size * sparsity)` of each block over all
    rows, or of every M columns all but N, chosen at the first of them. The error of every removed weight is pushed
    onto the columns after it. Works in float64.

    Raises NumericalError when a score is not finite, UsageError when N:M does not divide the inputs.
    """
    if rule.n_of_m is not None:
        check_n_of_m(weight_OI.shape[1], *rule.n_of_m)
    upper_II, updated_OI = factor.upper_II.double(), weight_OI.double().clone()
    mask_OI = torch.ones_like(weight_OI, dtype=torch.bool)
    for start in range(0, weight_OI.shape[1], column_block):
        columns = slice(start, start + column_block)
        upper_CC = upper_II[columns, columns]
        size_C = upper_CC.diagonal().masked_fill(factor.dead_I[columns], torch.inf)
        error_OC = _prune_block(updated_OI[:, columns], mask_OI[:, columns], upper_CC, size_C, rule)
        updated_OI[:, start + column_block :] -= error_OC @ upper_II[columns, start + column_block :]
    return mask_OI, (updated_OI * mask_OI).float()


def _prune_block(
    weight_OC: Tensor, keep_OC: Tensor, upper_CC: Tensor, size_C: Tensor, rule: MaskRule
) -> Tensor:
    """Prunes a block of columns in place, `keep_OC` as well; returns the errors that later blocks make up for.

    size_C: what weights are divided by to rank them
    """
    if rule.n_of_m is None:
        score_1S = (weight_OC / size_C).square().reshape(1, -1)
        removed = int(score_1S.shape[1] * rule.sparsity)
        keep_OC.copy_(keep_all_but_lowest(_finite(score_1S), removed).reshape(weight_OC.shape))
    error_OC = torch.zeros_like(weight_OC)
    for column in range(weight_OC.shape[1]):
        if rule.n_of_m is not None and column % rule.n_of_m[1] == 0:
            group = slice(column, column + rule.n_of_m[1])
            score_OM = (weight_OC[:, group] / size_C[group]).square()
            keep_OC[:, group] = keep_n_of_m(_finite(score_OM), *rule.n_of_m)
        error_O = weight_OC[:, column] * ~keep_OC[:, column] / upper_CC[column, column]
        error_OC[:, column] = error_O
        weight_OC[:, column:] -= error_O[:, None] * upper_CC[column, column:]
    return error_OC


def _finite(score: Tensor) -> Tensor:
    if not bool(torch.isfinite(score).all()):
        raise NumericalError(
            "scores of SparseGPT are not finite: the weights or statistics hold NaN or infinity"
        )
    return score
