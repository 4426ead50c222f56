"""Scores, statistics and output errors against naive formulas in float64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.config.criterion import CALIBRATED_CRITERIA, CRITERIA
from raysweep.config.trial import Trial
from raysweep.pruning.criteria import SCORES, LayerView, prune_layer
from raysweep.pruning.recipe import MaskRecipe
from raysweep.pruning.scores import random_score
from raysweep.pruning.sparsegpt import inverse_factor
from raysweep.pruning.statistics import InputStatistics, merge, output_error

OUTPUTS, INPUTS, ROWS = 6, 8, 50


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    x = torch.randn(ROWS, INPUTS, generator=generator) * torch.logspace(-2, 2, INPUTS)
    x[:, 3] = 0
    return weight, x


def statistics_of(*parts: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics.empty(INPUTS)
    for x_NI in parts:
        statistics.add(x_NI)
    return statistics


def view_of(weight: torch.Tensor, statistics: InputStatistics) -> LayerView:
    return LayerView("layer", weight, statistics, lambda dampening: inverse_factor(statistics, dampening))


def recipe_of(**fields: object) -> MaskRecipe:
    return MaskRecipe.of(Trial(**{"recovery": "none", "sparsity": 0.5} | fields))


def naive_score(criterion: str, weight: np.ndarray, x: np.ndarray, power: float) -> np.ndarray:
    score, size = np.zeros_like(weight), np.abs(weight)
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            norm = sum(value**2 for value in x[:, i]) ** 0.5 / len(x) ** 0.5
            score[o, i] = {
                "magnitude": size[o, i],
                "wanda": size[o, i] * norm,
                "ria": (size[o, i] / sum(size[:, i]) + size[o, i] / sum(size[o])) * norm**power,
            }[criterion]
    return score


@pytest.mark.parametrize(
    ("criterion", "power"), [("magnitude", 0.5), ("wanda", 0.5), ("ria", 0.5), ("ria", 1.0), ("ria", 0.0)]
)
def test_scores_equal_their_formula_in_float64(layer, criterion, power):
    weight, x = layer
    recipe = recipe_of(criterion=criterion, ria_power=power if criterion == "ria" else None)
    expected = naive_score(criterion, weight.double().numpy(), x.double().numpy(), power)
    score = SCORES[criterion](view_of(weight, statistics_of(x)), recipe)
    np.testing.assert_allclose(score.numpy(), expected, rtol=1e-6)


def test_relative_importance_in_a_row_or_column_of_zeros_is_zero(layer):
    weight, x = layer
    weight = weight.clone()
    weight[2], weight[:, 5] = 0.0, 0.0
    score = SCORES["ria"](view_of(weight, statistics_of(x)), recipe_of(criterion="ria"))
    assert bool(torch.isfinite(score).all())
    assert not bool(score[2].count_nonzero() + score[:, 5].count_nonzero())


def test_random_scores_depend_on_seed_and_name_only():
    first = random_score((4, 5), seed=1, name="a")
    assert torch.equal(first, random_score((4, 5), seed=1, name="a"))
    assert not torch.equal(first, random_score((4, 5), seed=2, name="a"))
    assert not torch.equal(first, random_score((4, 5), seed=1, name="b"))


def test_statistics_equal_their_sums_in_float64(layer):
    _, x = layer
    statistics = statistics_of(x)
    exact = x.double().numpy()
    np.testing.assert_allclose(statistics.gram_II.numpy(), exact.T @ exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics.norm_I.numpy(), np.sqrt((exact**2).mean(0)), rtol=1e-6)
    np.testing.assert_allclose(statistics.sum_I.numpy(), exact.sum(0), rtol=1e-4, atol=1e-5)
    assert (statistics.rows, statistics.dead_inputs) == (ROWS, 1)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, ROWS), max_size=4))
def test_statistics_of_the_parts_are_those_of_the_whole_however_it_is_cut(layer, cuts):
    _, x = layer
    whole = statistics_of(x)
    parts = [x[start:stop] for start, stop in itertools.pairwise([0, *sorted(cuts), ROWS])]
    for other in (merge(map(statistics_of, parts)), statistics_of(*parts)):
        torch.testing.assert_close(other.gram_II, whole.gram_II, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(other.sum_I, whole.sum_I, rtol=1e-5, atol=1e-3)
        assert other.rows == whole.rows


@pytest.mark.parametrize("bias", [False, True])
def test_output_error_equals_the_error_of_every_row(layer, bias):
    weight, x = layer
    delta = weight * (weight.abs() < 0.5)
    delta_bias = torch.linspace(-1, 1, OUTPUTS) if bias else None
    change = x.double() @ delta.double().T + (delta_bias.double() if delta_bias is not None else 0)
    error = output_error(statistics_of(x), delta, delta_bias)
    assert error == pytest.approx((change**2).sum().item(), rel=1e-5)


def test_search_spaces_know_the_criteria():
    assert set(CRITERIA) == {*SCORES, "sparsegpt"}
    assert set(CALIBRATED_CRITERIA) < set(CRITERIA)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_do_not_change_the_layer_and_read_activations_only_if_they_say_so(layer, criterion):
    weight, x = layer
    statistics = statistics_of(x)
    view, recipe = view_of(weight.clone(), statistics), recipe_of(criterion=criterion)
    gram = statistics.gram_II.clone()
    pruned = prune_layer(recipe, view)
    assert torch.equal(view.weight_OI, weight)
    assert torch.equal(statistics.gram_II, gram)
    other = view_of(weight, statistics_of(x.flip(1) ** 2))
    same = torch.equal(prune_layer(recipe, other).mask_OI, pruned.mask_OI)
    assert same == (criterion not in CALIBRATED_CRITERIA)
    assert pruned.dead_inputs == 1
