"""Masks against a naive stable sort, with ties, in every group and pattern."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.errors import NumericalError, UsageError
from raysweep.pruning.masks import pruning_mask
from raysweep.pruning.rules import MaskRule


def naive_mask(score: np.ndarray, rule: MaskRule) -> np.ndarray:
    """Removes weights one by one, lowest first, first in memory first."""
    rows, columns = score.shape
    keep = np.ones((rows, columns), dtype=bool)
    if rule.n_of_m:
        kept, size = rule.n_of_m
        groups = [
            [(r, c) for c in range(start, start + size)]
            for r in range(rows)
            for start in range(0, columns, size)
        ]
        counts = [size - kept] * len(groups)
    elif rule.comparison_group == "row":
        groups = [[(r, c) for c in range(columns)] for r in range(rows)]
        counts = [int(columns * rule.sparsity)] * rows
    else:
        groups = [[(r, c) for r in range(rows) for c in range(columns)]]
        counts = [int(rows * columns * rule.sparsity)]
    for group, count in zip(groups, counts, strict=True):
        for place in sorted(group, key=lambda place: score[place])[:count]:  # Python's sort is stable
            keep[place] = False
    return keep


rules = st.one_of(
    st.builds(
        MaskRule,
        sparsity=st.floats(0, 0.999),
        comparison_group=st.sampled_from(["row", "matrix"]),
    ),
    st.sampled_from([MaskRule(n_of_m=pair) for pair in [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)]]),
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 7),
    groups=st.integers(1, 4),
    levels=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    rule=rules,
)
def test_equals_a_naive_stable_sort_even_with_ties(rows, groups, levels, seed, rule):
    score = np.random.default_rng(seed).integers(0, levels, (rows, groups * 8)).astype(np.float32)
    mask = pruning_mask(torch.from_numpy(score), rule)
    np.testing.assert_array_equal(mask.numpy(), naive_mask(score, rule))


def test_a_constant_score_removes_exactly_the_requested_count():
    assert pruning_mask(torch.zeros(5, 10), MaskRule(sparsity=0.7)).sum().item() == 5 * 3
    assert (
        pruning_mask(torch.zeros(5, 10), MaskRule(sparsity=0.33, comparison_group="matrix")).sum().item()
        == 34
    )


def test_scores_that_are_not_finite_rank_nothing():
    score = torch.ones(2, 4)
    score[0, 1] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        pruning_mask(score, MaskRule(sparsity=0.5))


def test_groups_must_divide_the_inputs():
    with pytest.raises(UsageError, match="2:4 needs a number of inputs that 4 divides, not 6"):
        pruning_mask(torch.ones(2, 6), MaskRule(n_of_m=(2, 4)))
