"""A space becomes its distinct trials, in an order that runs phase by phase; draws are only extended."""

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.config.expansion import Sampled
from raysweep.config.space import SearchSpace
from raysweep.config.trial import Trial
from raysweep.errors import UsageError

BASE = {
    "name": "a",
    "model": {"path": "m"},
    "calibration": {"dataset": "builtin:x"},
}


def space_of(*groups, **sections):
    return SearchSpace.from_dict({**BASE, "sweep": list(groups), **sections})


def trials_of(*groups, **sections):
    return [planned.trial for planned in space_of(*groups, **sections).expand()]


def test_a_grid_in_file_order_last_axis_fastest():
    group = {
        "recovery": "reconstruct",
        "learning_rate": [1e-3, 1e-2],
        "criterion": ["wanda", "magnitude"],
        "granularity": "block",
        "sparsity": [0.5, 0.6],
    }
    made = [(trial.learning_rate, trial.criterion, trial.sparsity) for trial in trials_of(group)[1:]]
    assert made == list(product([1e-3, 1e-2], ["wanda", "magnitude"], [0.5, 0.6]))


def test_fields_that_cannot_matter_make_no_trials():
    group = {
        "recovery": ["none", "reconstruct"],
        "criterion": ["magnitude", "wanda"],
        "sparsity": 0.5,
        "granularity": ["block", "matrix"],
        "learning_rate": [1e-3, 1e-2],
    }
    assert len(trials_of(group)) == 1 + 2 + 2 * 4


def test_the_union_has_each_trial_once():
    small = {"recovery": "none", "criterion": "wanda", "sparsity": 0.5}
    large = {"recovery": "none", "criterion": ["magnitude", "wanda"], "sparsity": [0.5, 0.5, 0.6]}
    assert trials_of(small, large, small) == trials_of(small) + [
        Trial(recovery="none", criterion=criterion, sparsity=sparsity)
        for criterion, sparsity in [("magnitude", 0.5), ("magnitude", 0.6), ("wanda", 0.6)]
    ]


def test_phases_model_by_model_and_calibration_by_calibration():
    space = space_of(
        {"recovery": "none", "criterion": ["wanda", "magnitude"], "sparsity": 0.5},
        model={"path": ["m", "n"], "dtype": "float32"},
        calibration={"dataset": "builtin:x", "seed": [1, 0]},
    )
    made = [
        (planned.model.path, planned.calibration and planned.calibration.seed, planned.trial.criterion)
        for planned in space.expand()
    ]
    per_model = [(None, None), (1, "wanda"), (1, "magnitude"), (0, "wanda"), (0, "magnitude")]
    assert made == [(path, *rest) for path in ("m", "n") for rest in per_model]


def test_seeds_default_to_the_calibration_seed():
    group = {"recovery": "none", "criterion": "random", "sparsity": 0.5}
    calibration = {"dataset": "builtin:x", "seed": [4, 9]}
    assert [trial.seed for trial in trials_of(group, calibration=calibration)] == [None, 4, 9]
    assert [trial.seed for trial in trials_of({**group, "seed": [1, 2]}, calibration=calibration)] == [
        None, 1, 2, 1, 2,
    ]  # fmt: skip


RANDOM_GROUP = {
    "recovery": "reconstruct",
    "criterion": ["wanda", "magnitude"],
    "sparsity": {"uniform": [0.4, 0.7]},
    "granularity": {"choice": ["matrix", "subblock", "block"]},
    "learning_rate": {"loguniform": [1e-5, 1e-2]},
}


def drawn(num_samples, seed=0, before=()):
    search = {"algorithm": "random", "num_samples": num_samples, "seed": seed}
    return trials_of(*before, RANDOM_GROUP, search=search)[1:]


def test_draws_are_per_point_of_the_listed_axes():
    trials = drawn(5)
    assert len(trials) == 2 * 5
    wanda, magnitude = ([t for t in trials if t.criterion == name] for name in ("wanda", "magnitude"))
    assert [(t.sparsity, t.learning_rate) for t in wanda] == [
        (t.sparsity, t.learning_rate) for t in magnitude
    ]
    assert len({t.learning_rate for t in trials}) == 5


def test_a_choice_of_names_is_drawn_one_by_one():
    group = RANDOM_GROUP | {"targets": {"choice": ["q_proj", ["k_proj", "v_proj"]]}}
    found = trials_of(group, search={"algorithm": "random", "num_samples": 12, "seed": 0})[1:]
    assert {trial.targets for trial in found} == {("q_proj",), ("k_proj", "v_proj")}


def test_null_in_a_list_is_the_default():
    group = {"recovery": "none", "criterion": "sparsegpt", "sparsity": 0.5, "dampening": [None, 0.1, 0.01]}
    assert [trial.dampening for trial in trials_of(group)[1:]] == [0.01, 0.1]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**63 - 1))
@settings(max_examples=25, deadline=None)
def test_more_samples_extend_fewer(few, more, seed):
    few, more = sorted((few, more))
    assert set(drawn(few, seed)) <= set(drawn(more, seed))


def test_draws_depend_on_seed_and_group():
    other = {"recovery": "none", "criterion": "wanda", "sparsity": 0.5}
    assert not set(drawn(4)) & set(drawn(4, seed=1))
    assert not set(drawn(4)) & set(drawn(4, before=[other]))


def test_draws_are_the_same_on_every_machine():
    assert Sampled("loguniform", (1e-5, 1e-2)).draw("0/0/0/learning_rate") == 0.00133238
    assert Sampled("uniform", (0.4, 0.7)).draw("0/0/0/sparsity") == 0.488828
    assert Sampled("choice", ("a", "b", "c")).draw("0/0/0/granularity") == "b"


@given(st.integers(0, 10**6), st.floats(1e-8, 1e-2), st.floats(1.001, 1e6))
@settings(max_examples=100, deadline=None)
def test_draws_stay_within_their_bounds(key, low, ratio):
    for kind in ("uniform", "loguniform"):
        assert low <= Sampled(kind, (low, low * ratio)).draw(str(key)) <= low * ratio


def test_draws_have_the_distribution_they_are_asked_for():
    logs = sorted(math.log10(Sampled("loguniform", (1e-4, 1e-2)).draw(str(k))) for k in range(2000))
    plain = sorted(Sampled("uniform", (2.0, 6.0)).draw(str(k)) for k in range(2000))
    for rank in (200, 1000, 1800):
        assert logs[rank] == pytest.approx(-4 + 2 * rank / 2000, abs=0.1)
        assert plain[rank] == pytest.approx(2 + 4 * rank / 2000, abs=0.2)


@pytest.mark.parametrize(
    ("sampled", "said"),
    [
        ({"loguniform": [1e-2, 1e-5]}, "low below high"),
        ({"loguniform": [1e-5]}, "low below high"),
        ({"loguniform": [1e-5, 1e-3, 1e-2]}, "low below high"),
        ({"loguniform": [1e-5, 1e-5]}, "low below high"),
        ({"loguniform": [0, 1e-2]}, "above 0"),
        ({"loguniform": [None, 1e-2]}, "low below high"),
        ({"loguniform": 1e-2}, "loguniform: [low, high]"),
        ({"normal": [0, 1]}, "loguniform: [low, high]"),
        ({"uniform": [1e-5, 1e-2], "choice": [1]}, "loguniform: [low, high]"),
        ({"choice": []}, "empty list"),
        ({"uniform": [None, 0.1]}, "low below high"),
        ({}, "loguniform: [low, high]"),
        ({"uniform": ["a", "b"]}, "'a' (text)"),
    ],
)
def test_sampled_fields_are_checked(sampled, said):
    search = {"algorithm": "random", "num_samples": 2}
    with pytest.raises(UsageError) as caught:
        trials_of({**RANDOM_GROUP, "learning_rate": sampled}, search=search)
    assert said in str(caught.value)
    assert "sweep[0].learning_rate" in caught.value.where


def test_whole_numbers_are_not_drawn_from_an_interval():
    with pytest.raises(UsageError, match="choice"):
        trials_of(
            {**RANDOM_GROUP, "epochs": {"uniform": [1, 5]}}, search={"algorithm": "random", "num_samples": 2}
        )


VALUES = {
    "recovery": ["none", "reconstruct"],
    "criterion": ["magnitude", "random", "wanda"],
    "sparsity": [0.0, 0.25, 0.5],
    "comparison_group": ["row", "matrix"],
    "granularity": ["matrix", "block"],
    "learning_rate": [1e-3, 1e-2],
    "shuffle": [True, False],
    "seed": [0, 1],
}
GROUPS = st.fixed_dictionaries(
    {name: st.lists(st.sampled_from(values), min_size=1, max_size=2) for name, values in VALUES.items()}
)


@given(st.lists(GROUPS, min_size=1, max_size=2))
@settings(max_examples=40, deadline=None)
def test_expansion_is_the_set_of_all_combinations(groups):
    trials = trials_of(*groups)
    naive = {Trial.dense()}
    for group in groups:
        for values in product(*group.values()):
            naive.add(Trial(**dict(zip(group, values, strict=True))))
    assert len(trials) == len(set(trials))
    assert set(trials) == naive
