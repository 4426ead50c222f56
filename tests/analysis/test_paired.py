"""Verdicts on paired differences agree with the textbook, and are wrong no more often than they say."""

from __future__ import annotations

import gc
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from raysweep.analysis.paired import (
    ALPHA,
    BETTER,
    EQUIVALENT,
    UNDECIDED,
    WORSE,
    Margin,
    advised,
    difference,
    in_words,
    judged,
    ratio,
)

MARGIN = Margin()
VALUES, REFERENCES = [10.1, 10.4, 9.8, 10.2], [10.0, 10.5, 9.9, 10.0]


def comparison(values, references, margin=MARGIN, **about):
    return {"value": "a", "reference": "b"} | about | difference(values, references, margin)


def verdict(*comparisons):
    return judged(pd.DataFrame(list(comparisons))).verdict.tolist()


def test_a_difference_is_that_of_the_textbook():
    """Student's paired t by hand: mean 0.025, sd 0.15, n 4."""
    found = difference(VALUES, REFERENCES, Margin(0.3, 0.0))
    error = 0.15 / 2
    assert found["seeds"] == 4
    assert found["difference"] == pytest.approx(0.025)
    assert found["spread"] == pytest.approx(0.15)
    assert found["low"] == pytest.approx(0.025 - 3.182446 * error, rel=1e-6)
    assert found["high"] == pytest.approx(0.025 + 3.182446 * error, rel=1e-6)
    assert found["p_difference"] == pytest.approx(2 * stats.t.sf(0.025 / error, 3))
    above, below = stats.t.sf((0.025 + 0.3) / error, 3), stats.t.sf((0.3 - 0.025) / error, 3)
    assert found["p_equivalence"] == pytest.approx(max(above, below))


def test_the_margin_is_the_larger_of_both():
    assert Margin(0.1, 0.01).at(5.0) == 0.1
    assert Margin(0.1, 0.01).at(40.0) == pytest.approx(0.4)
    assert difference([40.0, 41.0], [40.0, 40.0], Margin(0.1, 0.01))["margin"] == pytest.approx(0.4)


def test_better_worse_equivalent_and_undecided():
    rng = np.random.default_rng(0)
    base = 10 + rng.normal(0, 0.5, 6)
    noise = 0.02 * rng.normal(0, 1, 6)
    lower, higher, same = base - 1 + noise, base + 1 + noise, base + noise
    wide = base + np.array([0.5, -0.4, 0.3, -0.6, 0.2, 0.1])
    found = [comparison(values, base) for values in (lower, higher, same, wide)]
    assert verdict(*found) == [BETTER, WORSE, EQUIVALENT, UNDECIDED]


def test_a_sure_but_small_difference_is_equivalent():
    base = np.linspace(10, 11, 8)
    small = base + 0.03 + 0.001 * np.array([1, -1, 1, -1, 1, -1, 1, -1])
    found = comparison(small, base)
    assert found["p_difference"] < 1e-6
    assert verdict(found) == [EQUIVALENT]


def test_what_does_not_depend_on_the_seed_is_known_exactly():
    same, other = comparison([7.0, 7.0], [7.0, 7.0]), comparison([7.0, 7.0], [9.0, 9.0])
    near = comparison([0.1 + 0.2, 0.3], [0.35, 0.35])
    rounded = comparison([1.1 + 0.1, 2.3], [1.2, 2.3], Margin(0.0, 0.0))
    assert verdict(same, other, near, rounded) == [EQUIVALENT, BETTER, EQUIVALENT, UNDECIDED]
    assert (other["low"], other["high"], other["spread"]) == (-2.0, -2.0, 0.0)


def test_without_seeds_nothing_is_decided():
    one, none = comparison([7.0], [9.0]), comparison([], [])
    frame = advised(judged(pd.DataFrame([one, none])))
    assert frame.verdict.tolist() == [UNDECIDED, UNDECIDED]
    assert frame.more_seeds.tolist() == [2.0, 3.0]
    assert (
        in_words(frame.iloc[0]) == "a against b is undecided: -2 perplexity; one seed says nothing of chance"
    )
    assert in_words(frame.iloc[1]) == "a and b have no seed in common"
    assert advised(judged(pd.DataFrame(columns=list(one)))).empty


def test_verdicts_are_corrected_for_one_another_by_holm():
    """p of 0.011, 0.02, 0.03 and 0.5: Holm's are 0.044, 0.06, 0.06 and 0.5."""
    raw = [0.011, 0.02, 0.03, 0.5]
    about = comparison([8.0, 8.1], [9.0, 9.0]) | {"p_equivalence": 0.9}
    frame = judged(pd.DataFrame([about | {"p_difference": p} for p in raw]))
    assert frame.decisive.tolist() == pytest.approx([0.044, 0.06, 0.06, 0.5])
    assert frame.verdict.tolist() == [BETTER, UNDECIDED, UNDECIDED, UNDECIDED]


def test_the_seeds_that_are_advised_have_the_power_that_is_promised():
    rng = np.random.default_rng(3)
    about = comparison([10.3, 9.9, 10.4], [10.0, 10.0, 10.0], Margin(0.0, 0.0))
    row = advised(judged(pd.DataFrame([about]))).iloc[0]
    seeds = int(row.seeds + row.more_seeds)
    drawn = rng.normal(row.difference, row.spread, (4000, seeds))
    decided = np.mean(stats.ttest_1samp(drawn, 0.0, axis=1).pvalue <= ALPHA)
    fewer = np.mean(stats.ttest_1samp(drawn[:, 1:], 0.0, axis=1).pvalue <= ALPHA)
    assert decided >= 0.8 - 0.02
    assert fewer < 0.8 + 0.02
    assert f"about {row.more_seeds:.0f} more seeds would decide" in in_words(row)


def test_seeds_that_would_not_help_are_not_advised():
    hopeless = comparison([10.1, 9.9, 10.3, 9.9], [10.0] * 4, Margin(0.05, 0.0))
    row = advised(judged(pd.DataFrame([hopeless]))).iloc[0]
    assert math.isnan(row.more_seeds)
    assert "more than 100 more seeds" in in_words(row)


@pytest.mark.parametrize(
    ("true", "wrong"), [(0.0, {BETTER, WORSE}), (0.1, {EQUIVALENT}), (-0.1, {EQUIVALENT})]
)
@pytest.mark.parametrize("seeds", [3, pytest.param(8, marks=pytest.mark.long)])
def test_a_report_is_wrong_no_more_often_than_one_in_twenty(true, wrong, seeds):
    """A thousand reports of four comparisons, with noise of several sizes, without a difference or with one at the
    margin."""
    rng, reports, comparisons = np.random.default_rng(seeds), 1000, 4
    false = 0
    gc.freeze()  # statsmodels collects garbage whenever it corrects, which takes long where much is loaded
    for _ in range(reports):
        base = rng.normal(10, 0.5, (comparisons, seeds))
        noise = rng.normal(0, 1, (comparisons, seeds)) * rng.choice([0.01, 0.05, 0.2], (comparisons, 1))
        found = [comparison(b + true + n, b, Margin(0.1, 0.0)) for b, n in zip(base, noise, strict=True)]
        false += bool({*verdict(*found)} & wrong)
    gc.unfreeze()
    assert false / reports <= ALPHA + 2 * math.sqrt(ALPHA * (1 - ALPHA) / reports)


def test_a_ratio_is_a_geometric_mean_with_an_interval_over_pairs():
    rng = np.random.default_rng(0)
    references = rng.uniform(1, 50, 40)
    values = references * 4 * np.exp(rng.normal(0, 0.1, 40))
    found = ratio(values, references)
    assert found["ratio"] == pytest.approx(math.exp(np.mean(np.log(values / references))))
    assert found["low"] < 4 < found["high"]
    half = 1.96 * 0.1 / math.sqrt(40)
    assert found["high"] / found["low"] == pytest.approx(math.exp(2 * half), rel=0.03)
    assert ratio(values, references) == found
    assert ratio([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]) == {"ratio": 2.0, "low": 2.0, "high": 2.0}
    assert math.isnan(ratio([2.0, 3.0], [1.0, 1.0])["low"])
