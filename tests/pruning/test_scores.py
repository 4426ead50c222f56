"""Scores, statistics and output errors against naive formulas in float64."""

import numpy as np
import pytest
import torch

from raysweep.pruning.criteria import CRITERIA, LayerView
from raysweep.pruning.scores import random_score
from raysweep.pruning.statistics import InputStatistics, merge, output_error

OUTPUTS, INPUTS, ROWS = 6, 8, 50


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    x = torch.randn(ROWS, INPUTS, generator=generator) * torch.logspace(-2, 2, INPUTS)
    x[:, 3] = 0
    return weight, x


def naive_score(criterion: str, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    score = np.zeros_like(weight)
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            size = abs(weight[o, i])
            score[o, i] = {
                "magnitude": size,
                "wanda": size * sum(value**2 for value in x[:, i]) ** 0.5 / len(x) ** 0.5,
            }[criterion]
    return score


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_scores_equal_their_formula_in_float64(layer, criterion):
    weight, x = layer
    view = LayerView("layer", weight, InputStatistics.of(x))
    expected = naive_score(criterion, weight.double().numpy(), x.double().numpy())
    np.testing.assert_allclose(CRITERIA[criterion].score(view).numpy(), expected, rtol=1e-6)


def test_random_scores_depend_on_seed_and_name_only():
    first = random_score((4, 5), seed=1, name="a")
    assert torch.equal(first, random_score((4, 5), seed=1, name="a"))
    assert not torch.equal(first, random_score((4, 5), seed=2, name="a"))
    assert not torch.equal(first, random_score((4, 5), seed=1, name="b"))


def test_statistics_equal_their_sums_in_float64(layer):
    _, x = layer
    statistics = InputStatistics.of(x)
    exact = x.double().numpy()
    np.testing.assert_allclose(statistics.gram_II.numpy(), exact.T @ exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics.norm_I.numpy(), np.sqrt((exact**2).mean(0)), rtol=1e-6)
    assert statistics.dead_inputs == 1


def test_statistics_of_two_halves_merge_into_those_of_the_whole(layer):
    _, x = layer
    whole = InputStatistics.of(x)
    halves = merge([InputStatistics.of(x[:17]), InputStatistics.of(x[17:])])
    running = InputStatistics.empty(INPUTS).accumulate(x[:17]).accumulate(x[17:])
    for other in (halves, running):
        torch.testing.assert_close(other.gram_II, whole.gram_II)
        torch.testing.assert_close(other.sum_I, whole.sum_I)
        assert other.rows == whole.rows


@pytest.mark.parametrize("bias", [False, True])
def test_output_error_equals_the_error_of_every_row(layer, bias):
    weight, x = layer
    delta = weight * (weight.abs() < 0.5)
    delta_bias = torch.linspace(-1, 1, OUTPUTS) if bias else None
    change = x.double() @ delta.double().T + (delta_bias.double() if delta_bias is not None else 0)
    error = output_error(InputStatistics.of(x), delta, delta_bias)
    assert error == pytest.approx((change**2).sum().item(), rel=1e-5)
