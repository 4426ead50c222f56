"""What is recommended is the cheapest setting that is as good as the best one, and its space runs that trial."""

from __future__ import annotations

import pytest

from raysweep.analysis.ladder import tuned
from raysweep.analysis.paired import Margin
from raysweep.analysis.recipe import recipe_yaml, recommended
from raysweep.analysis.rows import records
from raysweep.analysis.settings import with_settings
from raysweep.config.space import SearchSpace
from raysweep.config.trial import Trial
from tests.analysis.rows import row
from tests.analysis.synthetic import sweep_of


def measured(number, quality, seconds, **fields):
    return row(number, validation_perplexity=quality, device_seconds_standalone=seconds, **fields)


def recommendation(rows, tmp_path, margin=Margin(0.1, 0.0)):  # noqa: B008
    return records(recommended(tuned(with_settings(sweep_of([row(0, "dense"), *rows], tmp_path))), margin))


def over_seeds(place, quality, seconds, wobble=0.0, seeds=(0, 1, 2, 3), **fields):
    """Rows of a setting, whose quality differs between seeds as that of all others does, and by its own wobble."""
    return [
        measured(
            100 * place + seed,
            quality + 0.3 * seed + wobble * (-1) ** seed,
            seconds,
            calibration_seed=seed,
            seed=seed,
            **fields,
        )
        for seed in seeds
    ]


def test_a_cheaper_one_that_is_as_good_over_all_seeds_is_preferred(tmp_path):
    rows = over_seeds(1, 8.00, 30.0, granularity="model")
    rows += over_seeds(2, 8.05, 10.0, wobble=0.01, granularity="subblock")
    rows += over_seeds(3, 8.02, 5.0, wobble=0.2, granularity="block")
    rows += over_seeds(4, 8.20, 1.0, granularity="matrix")
    (found,) = recommendation(rows, tmp_path)
    assert (found["method"], found["best"], found["is_best"]) == ("subblock", "wanda/row 0.6 model", False)
    assert found["behind"] == pytest.approx(0.05)
    assert found["trial_id"] == f"{200:016x}" or found["trial_id"] == f"{201:016x}"


def test_with_too_few_seeds_the_best_one_is_recommended(tmp_path):
    rows = over_seeds(1, 8.00, 30.0, granularity="model", seeds=(0, 1))
    rows += over_seeds(2, 8.00001, 10.0, granularity="subblock", seeds=(0, 1))
    (found,) = recommendation(rows, tmp_path)
    assert (found["method"], found["is_best"]) == ("model", True)


def test_every_sparsity_has_one_and_the_trial_is_the_best_of_its_seeds(tmp_path):
    rows = [
        measured(1 + seed + 10 * place, 8.0 - seed, 5.0, sparsity=sparsity, calibration_seed=seed, seed=seed)
        for place, sparsity in enumerate((0.5, 0.6))
        for seed in (0, 1)
    ]
    found = recommendation(rows, tmp_path)
    assert [one["label"] for one in found] == ["wanda/row 0.5 subblock", "wanda/row 0.6 subblock"]
    assert [one["trial_id"] for one in found] == [f"{2:016x}", f"{12:016x}"]
    assert all(one["learning_rate"] == 1e-3 for one in found)


def test_without_validation_there_is_none(tmp_path):
    assert recommendation([row(1, validation_perplexity=None)], tmp_path) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"granularity": "block", "learning_rate": 3e-3, "epochs": 3},
        {"granularity": "matrix", "optimizer": "exact", "learning_rate": None},
        {"statistics_stream": "recovered"},
        {"criterion": "sparsegpt", "sparsity": None, "pattern": "2:4"},
        {"sparsity": {"*.mlp.*": 0.5, "*": 0.6}},
        {"targets": ["re:.*mlp.*"]},
    ],
    ids=str,
)
def test_the_space_of_a_recipe_runs_that_trial(tmp_path, fields):
    space = SearchSpace.from_dict(
        {
            "name": "a",
            "model": {"path": ["builtin:pystdlib", "other"], "dtype": "float32"},
            "calibration": {"dataset": "builtin:pystdlib", "num_samples": 8, "seed": [3, 4]},
            "sweep": [{"recovery": "none", "criterion": "wanda", "sparsity": 0.5}],
            "execution": {"shards": 2},
        }
    )
    own = {"calibration_seed": 4, "calibration_num_samples": 8}
    (wanted,) = records(sweep_of([row(1, **fields, **own)], tmp_path))
    made = SearchSpace.from_text(recipe_yaml(space, wanted))
    planned = [one for one in made.expand() if one.trial.recovery == "reconstruct"]
    assert [one.trial for one in planned] == [Trial.from_columns(wanted | {"seed": planned[0].trial.seed})]
    assert (planned[0].model.path, planned[0].calibration.seed) == ("builtin:pystdlib", 4)
    assert planned[0].calibration.num_samples == 8
    assert made.name == "a-recipe"
    behind = {one.trial.recovery for one in made.expand()}
    assert behind == {"dense", "reconstruct"} | (set() if "statistics_stream" in fields else {"none"})


def test_the_recipe_of_a_retraining_behind_a_reconstruction_and_of_a_sweep_without_validation(tmp_path):
    space = SearchSpace.from_dict(
        {
            "name": "a",
            "model": {"path": "builtin:pystdlib"},
            "calibration": {"dataset": "builtin:pystdlib"},
            "validation": {"samples": 0},
            "search": {"metric": "output_error_calibration"},
            "sweep": [{"recovery": "none", "criterion": "wanda", "sparsity": 0.5}],
        }
    )
    start = {"granularity": "block", "learning_rate": 1e-3}
    (wanted,) = records(sweep_of([row(1, "retrain", learning_rate=1e-4, start_from=start, seed=0)], tmp_path))
    made = SearchSpace.from_text(recipe_yaml(space, wanted))
    assert [one.trial for one in made.expand() if one.trial.recovery == "retrain"] == [
        Trial.from_columns(wanted)
    ]
    assert made.search.metric == "output_error_calibration"
