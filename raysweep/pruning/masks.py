"""Masks from scores: which weights stay. Counts are exact whatever the ties; masks are bool, True = kept."""

# O outputs, I inputs, G comparison groups, S size of a group

from __future__ import annotations

import torch
from torch import Tensor

from raysweep.at_once import RANKED_AT_ONCE
from raysweep.errors import NumericalError
from raysweep.pruning.rules import MaskRule, check_n_of_m


def pruning_mask(score_OI: Tensor, rule: MaskRule) -> Tensor:
    """The mask (O, I), bool, that removes the lowest scores under `rule`; of equal scores the first go first.

    Raises NumericalError when a score is not finite, UsageError when M does not divide the inputs.
    """
    if not bool(torch.isfinite(score_OI).all()):
        raise NumericalError(
            "scores are not finite, so they rank nothing: the weights or statistics hold NaN or infinity"
        )
    if rule.n_of_m is not None:
        kept, size = rule.n_of_m
        check_n_of_m(score_OI.shape[1], kept, size)
        return torch.cat([keep_n_of_m(rows, kept, size) for rows in _few_rows(score_OI)])
    groups = score_OI if rule.comparison_group == "row" else score_OI.reshape(1, -1)
    removed = int(groups.shape[1] * rule.sparsity)
    return torch.cat([keep_all_but_lowest(rows, removed) for rows in _few_rows(groups)]).reshape(
        score_OI.shape
    )


def _few_rows(groups: Tensor) -> list[Tensor]:
    """Rows are ranked apart: few at once, since ranking takes several times their memory."""
    few = max(1, RANKED_AT_ONCE // max(1, groups.shape[1]))
    return [groups[start : start + few] for start in range(0, len(groups), few)]


def keep_all_but_lowest(score_GS: Tensor, removed: int) -> Tensor:
    """True for all but the `removed` lowest of every row, exactly that many; ties go in the order of memory.

    Equals a stable sort, in linear time: the threshold is the order statistic, ties at it are counted off.
    """
    if removed == 0:
        return torch.ones_like(score_GS, dtype=torch.bool)
    threshold_G1 = torch.kthvalue(score_GS, removed, dim=1, keepdim=True).values
    below_GS = score_GS < threshold_G1
    tied_GS = score_GS == threshold_G1
    tied_removed_G1 = removed - below_GS.sum(1, keepdim=True, dtype=torch.int64)
    goes_GS = tied_GS & (tied_GS.cumsum(1, dtype=torch.int64) <= tied_removed_G1)
    return ~(below_GS | goes_GS)


def keep_n_of_m(score_OI: Tensor, kept: int, size: int) -> Tensor:
    """True for the `kept` highest of every `size` consecutive inputs, which must divide them; ties as above."""
    groups = score_OI.reshape(-1, size)
    lowest = torch.argsort(groups, dim=1, stable=True)[:, : size - kept]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(1, lowest, False).reshape(score_OI.shape)
