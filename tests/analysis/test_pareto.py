"""A setting is on the front when no other is as good for less."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysweep.analysis.ladder import tuned
from raysweep.analysis.pareto import pareto, pareto_front
from raysweep.analysis.settings import with_settings
from tests.analysis.rows import row
from tests.analysis.synthetic import sweep_of

NUMBERS = st.one_of(st.integers(0, 6).map(float), st.just(math.nan))


def front(*points):
    frame = pd.DataFrame(points, columns=["quality", "cost"])
    return pareto_front(frame.quality, frame.cost).tolist()


def test_what_is_beaten_is_not_on_it():
    assert front((10, 1), (9, 2), (9.5, 3), (8, 4)) == [True, True, False, True]


def test_equal_ones_are_on_it_together_and_ties_in_one_are_beaten():
    assert front((9, 2), (9, 2), (9, 3), (10, 2)) == [True, True, False, False]


def test_unknown_numbers_are_not_on_it():
    assert front((math.nan, 1), (9, math.nan), (9, 2)) == [False, False, True]
    assert front() == []


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12))
def test_it_is_that_of_the_definition(points):
    def beaten(one):
        return any(
            other[0] <= one[0] and other[1] <= one[1] and (other[0] < one[0] or other[1] < one[1])
            for other in points
        )

    assert front(*points) == [not any(map(math.isnan, one)) and not beaten(one) for one in points]


def test_settings_are_means_over_seeds_and_fronts_are_within_a_sparsity(tmp_path):
    rows = [row(0, "dense")]
    for sparsity, shift in ((0.5, 0.0), (0.6, 5.0)):
        for seed in (0, 1):
            for granularity, quality, seconds in (
                ("matrix", 9.0, 1.0),
                ("subblock", 8.0, 2.0),
                ("block", 8.5, 3.0),
            ):
                rows.append(
                    row(
                        len(rows),
                        sparsity=sparsity,
                        granularity=granularity,
                        calibration_seed=seed,
                        seed=seed,
                        perplexity=quality + shift + seed,
                        device_seconds_standalone=seconds,
                    )
                )
    means = pareto(tuned(with_settings(sweep_of(rows, tmp_path))))
    assert means.seeds.tolist() == [2] * 6
    assert means.perplexity.tolist() == [9.5, 8.5, 9.0, 14.5, 13.5, 14.0]
    assert means.front.tolist() == [True, True, False] * 2
    assert means.spread.tolist() == pytest.approx([np.std([0, 1], ddof=1)] * 6)
    assert means.label.tolist()[0] == "wanda/row 0.5 matrix"
