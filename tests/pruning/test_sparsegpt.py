"""SparseGPT against a naive version in float64, closed forms, exact counts, and Gram matrices without full rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.errors import NumericalError
from raysweep.pruning.rules import MaskRule
from raysweep.pruning.sparsegpt import InverseFactor, inverse_factor, sparsegpt
from raysweep.pruning.statistics import InputStatistics

DAMPENING = 0.01


def statistics_of(x_NI: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics.empty(x_NI.shape[1])
    statistics.add(x_NI)
    return statistics


def random_layer(outputs: int, inputs: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and correlated inputs of very different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(rows, inputs, generator=generator) @ mix * torch.logspace(-1, 1, inputs)
    return weight, x


def naive(
    weight: np.ndarray, gram: np.ndarray, rule: MaskRule, column_block: int
) -> tuple[np.ndarray, np.ndarray]:
    """The paper's algorithm on the inverse itself: after each column it is eliminated from the inverse (OBS)."""
    weight, (outputs, inputs) = weight.copy(), weight.shape
    damped = gram + DAMPENING * np.diag(gram).mean() * np.eye(inputs)
    inverse, keep = np.linalg.inv(damped), np.ones(weight.shape, dtype=bool)
    for column in range(inputs):
        start = column - column % column_block
        if rule.n_of_m is not None and column % rule.n_of_m[1] == 0:
            group = range(column, column + rule.n_of_m[1])
            score = weight[:, group] ** 2 / pivots(inverse, group)
            for row in range(outputs):
                lowest = np.argsort(score[row], kind="stable")[: rule.n_of_m[1] - rule.n_of_m[0]]
                keep[row, column + lowest] = False
        if rule.n_of_m is None and column == start:
            group = range(start, min(start + column_block, inputs))
            score = weight[:, group] ** 2 / pivots(inverse, group)
            lowest = np.argsort(score.ravel(), kind="stable")[: int(score.size * rule.sparsity)]
            keep[lowest // len(group), start + lowest % len(group)] = False
        for row in range(outputs):
            if not keep[row, column]:
                weight[row, column:] -= (
                    weight[row, column] / inverse[column, column] * inverse[column, column:]
                )
                weight[row, column] = 0.0
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column] = inverse[:, column] = 0.0
    return weight, keep


def pivots(inverse: np.ndarray, columns: range) -> np.ndarray:
    """Diagonal of the inverse at each column once those before it in the block are eliminated."""
    inverse, found = inverse.copy(), []
    for column in columns:
        found.append(inverse[column, column])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return np.array(found)


RULES = [MaskRule(0.5), MaskRule(0.73), MaskRule(n_of_m=(2, 4)), MaskRule(n_of_m=(1, 4))]


@pytest.mark.parametrize("column_block", [4, 8, 100])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_masks_and_weights_are_those_of_the_naive_version(rule, column_block):
    weight, x = random_layer(6, 20, 60)
    gram = x.double().numpy().T @ x.double().numpy()
    expected, keep = naive(weight.double().numpy(), gram, rule, column_block)
    mask, updated = sparsegpt(weight, inverse_factor(statistics_of(x), DAMPENING), rule, column_block)
    assert np.array_equal(mask.numpy(), keep)
    np.testing.assert_allclose(updated.numpy(), expected, rtol=2e-4, atol=2e-5)
    assert not bool(updated[~mask].count_nonzero())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_on_a_diagonal_gram_matrix_it_is_wanda_and_updates_nothing(rule):
    """Closed form: no input says anything about another, so W^2 * (h + damping) ranks and nothing is made up for."""
    weight, _ = random_layer(5, 16, 1)
    diagonal = torch.logspace(-2, 2, 16)
    statistics = InputStatistics(torch.diag(diagonal), torch.zeros(16), 7)
    mask, updated = sparsegpt(weight, inverse_factor(statistics, DAMPENING), rule, 16)
    score = weight.double() ** 2 * (diagonal + DAMPENING * diagonal.mean())
    if rule.n_of_m is None:
        lowest = score.flatten().argsort(stable=True)[: int(score.numel() * rule.sparsity)]
        expected = torch.ones(score.numel(), dtype=torch.bool).index_fill(0, lowest, False).reshape(5, 16)
    else:
        kept, size = rule.n_of_m
        lowest = score.reshape(-1, size).argsort(dim=1, stable=True)[:, : size - kept]
        expected = torch.ones(20, size, dtype=torch.bool).scatter(1, lowest, False).reshape(5, 16)
    assert torch.equal(mask, expected)
    torch.testing.assert_close(updated, weight * expected)


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 30),
    sparsity=st.floats(0, 0.99),
    column_block=st.integers(1, 32),
    ties=st.booleans(),
)
def test_every_block_of_columns_loses_exactly_what_was_asked(outputs, inputs, sparsity, column_block, ties):
    weight, x = random_layer(outputs, inputs, 8)
    weight = torch.ones_like(weight) if ties else weight
    mask, _ = sparsegpt(weight, inverse_factor(statistics_of(x), 0.1), MaskRule(sparsity), column_block)
    for start in range(0, inputs, column_block):
        block = mask[:, start : start + column_block]
        assert int((~block).sum()) == int(block.numel() * sparsity)


def few_rows() -> torch.Tensor:
    return random_layer(1, 24, 5)[1]


def dead_channel() -> torch.Tensor:
    x = random_layer(1, 24, 100)[1]
    x[:, 7] = 0.0
    return x


def duplicated_channels() -> torch.Tensor:
    x = random_layer(1, 24, 100)[1]
    x[:, 1], x[:, 20] = x[:, 0], x[:, 0]
    return x


@pytest.mark.parametrize("dampening", [0.01, 0.0])
@pytest.mark.parametrize("inputs", [few_rows, dead_channel, duplicated_channels])
def test_a_gram_matrix_without_full_rank_is_dampened_until_it_works_and_says_so(inputs, dampening):
    x, (weight, _) = inputs(), random_layer(6, 24, 1)
    factor = inverse_factor(statistics_of(x), dampening)
    assert (factor.fallback is None) == (factor.dampening == dampening)
    assert factor.dampening >= dampening
    assert dampening == 0.01 or factor.fallback == f"dampening {factor.dampening:g} instead of 0"
    identity = torch.eye(24)
    assert not torch.allclose(factor.upper_II / factor.upper_II.diagonal(), identity, atol=1e-3)
    mask, updated = sparsegpt(weight, factor, MaskRule(0.5))
    assert bool(torch.isfinite(updated).all())
    pruned_error = ((x.double() @ (weight * mask - weight).T.double()) ** 2).sum()
    assert ((x.double() @ (updated - weight).T.double()) ** 2).sum() < pruned_error


def test_dead_inputs_go_first():
    x, (weight, _) = dead_channel(), random_layer(6, 24, 1)
    weight[:, 7] = 1.0
    mask, _ = sparsegpt(weight, inverse_factor(statistics_of(x), DAMPENING), MaskRule(0.1))
    assert not bool(mask[:, 7].any())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_gram_matrix_of_nothing_is_an_error(value):
    statistics = InputStatistics(torch.full((4, 4), value), torch.zeros(4), 3)
    with pytest.raises(NumericalError, match="Gram matrix"):
        inverse_factor(statistics, DAMPENING)


def test_a_matrix_that_is_not_positive_definite_whatever_is_added_is_an_error():
    statistics = InputStatistics(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), torch.zeros(2), 3)
    with pytest.raises(NumericalError, match="even with dampening 1:"):
        inverse_factor(statistics, DAMPENING)


def test_weights_that_are_not_finite_are_an_error():
    weight, x = random_layer(3, 8, 20)
    weight[1, 2] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        sparsegpt(weight, inverse_factor(statistics_of(x), DAMPENING), MaskRule(0.5))


def test_the_factor_is_that_of_the_inverse_and_does_not_depend_on_the_threads():
    _, x = random_layer(1, 200, 400)
    statistics = statistics_of(x)
    factors: list[InverseFactor] = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        factors.append(inverse_factor(statistics, DAMPENING))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert all(torch.equal(factor.upper_II, factors[0].upper_II) for factor in factors)
    gram = statistics.gram_II.double() / statistics.gram_II.diagonal().double().mean()
    damped = gram + DAMPENING * torch.eye(200)
    upper = factors[0].upper_II.double()
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(200).double(), rtol=0, atol=1e-3)
    assert not bool(upper.tril(-1).count_nonzero())
