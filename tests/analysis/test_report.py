"""A report answers what its rows can answer, and says what is missing."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pandas as pd
import pytest

from raysweep.analysis import questions
from raysweep.analysis.ladder import tuned
from raysweep.analysis.paired import ALPHA, BETTER, EQUIVALENT, WORSE, Margin, judged
from raysweep.analysis.report import make_report, report_of
from raysweep.analysis.settings import METRIC, QUALITY, SETTING_COLUMNS, with_settings
from raysweep.config.sections import METRICS
from raysweep.config.space import SearchSpace
from raysweep.results.folders import SPACE_FILE
from raysweep.results.reader import load_results, load_units
from tests.analysis.rows import failed, row, write_sweep
from tests.analysis.synthetic import sweep_of, trials

SPACE = {
    "name": "a",
    "model": {"path": "builtin:pystdlib"},
    "calibration": {"dataset": "builtin:pystdlib", "seed": [0, 1]},
    "sweep": [
        {"recovery": "none", "criterion": ["wanda", "magnitude"], "sparsity": 0.5},
        {
            "recovery": "reconstruct",
            "criterion": ["wanda", "magnitude"],
            "sparsity": 0.5,
            "granularity": ["subblock", "block"],
            "learning_rate": 1e-3,
        },
    ],
}

NEEDED = {
    *SETTING_COLUMNS,
    *questions.COSTS,
    QUALITY,
    METRIC,
    "setting",
    "stratum",
    "repeat",
    "method",
    "mask",
}


def flat(trial):
    return 10.0 + trial["seed"]


def test_a_report_has_all_its_parts(tmp_path):
    made = trials(flat, seeds=(0, 1), criteria=("wanda", "magnitude"), granularities=("subblock", "block"))
    folder = write_sweep(tmp_path / "a", made)
    (folder / SPACE_FILE).write_text(SearchSpace.from_dict(SPACE).resolved_yaml())
    report = report_of(folder)
    assert report.name == "a"
    assert report.missing == []
    assert report.failed == []
    asked = report.comparisons.groupby("question").size().to_dict()
    assert asked == {"granularity": 1, "criterion before recovery": 1, "criterion after recovery": 1}
    assert set(report.comparisons.verdict) == {EQUIVALENT}
    assert len(report.of("granularity")) == 1
    assert set(report.settings.setting) <= set(report.labels)
    assert set(report.settings.stratum) <= set(report.strata)
    assert list(report.strata.values()) == ["sparsity 0.5"]
    assert report.learning_rates.place.unique().tolist() == ["only one"]
    assert SearchSpace.from_text(report.recipes["yaml"].iloc[0]).name == "a-recipe"


def test_what_is_missing_and_what_failed_is_told(tmp_path):
    made = trials(flat, seeds=(0,), criteria=("wanda",), granularities=("subblock",))
    made.append(failed(90, "the loss is nan", criterion="magnitude", sparsity=0.5, seed=0))
    folder = write_sweep(tmp_path / "a", made)
    (folder / SPACE_FILE).write_text(SearchSpace.from_dict(SPACE).resolved_yaml())
    report = report_of(folder)
    assert report.failed == [("magnitude/row 0.5 subblock lr=0.001", "the loss is nan")]
    assert "wanda/row 0.5 block lr=0.001" in report.missing
    assert "wanda/row 0.5 calibration.seed=1" in report.missing
    assert "magnitude/row 0.5 subblock lr=0.001" not in report.missing
    assert len(report.missing) == 12 - 3


def test_trials_on_another_calibration_set_are_missing_and_called_so(tmp_path):
    made = trials(flat, seeds=(0, 1), criteria=("wanda", "magnitude"), granularities=("subblock", "block"))
    folder = write_sweep(tmp_path / "a", made)
    space = SPACE | {"calibration": SPACE["calibration"] | {"num_samples": [64, 128]}}
    (folder / SPACE_FILE).write_text(SearchSpace.from_dict(space).resolved_yaml())
    missing = report_of(folder).missing
    assert len(missing) == 12
    assert all(label.endswith("calibration.num_samples=128") for label in missing)
    both = [
        *made,
        *(
            one | {"trial_id": f"{600 + n:016x}", "calibration_num_samples": 128}
            for n, one in enumerate(made[1:])
        ),
    ]
    labels = list(
        make_report("a", sweep_of(both, tmp_path / "b"), load_units(tmp_path / "b" / "a")).labels.values()
    )
    assert len(labels) == len(set(labels)) == 13


@pytest.mark.parametrize("metric", METRICS)
def test_a_report_chooses_by_the_metric_of_its_sweep(tmp_path, metric):
    """By each the other granularity is the better one; by an error the margin in perplexity counts for nothing."""
    made = trials(flat, seeds=range(3), criteria=("wanda",), granularities=("matrix", "block"))
    for one in made:
        for name in METRICS:
            good = (one.get("granularity") == "block") == (name == metric)
            one[name] = (0.2 if good else 0.25) + 0.001 * (one.get("calibration_seed") or 0)
        if metric.endswith("perplexity"):
            one[metric] *= 30
    folder = write_sweep(tmp_path / "a", made)
    space = SPACE | {"search": {"metric": metric}}
    (folder / SPACE_FILE).write_text(SearchSpace.from_dict(space).resolved_yaml())
    report = report_of(folder)
    (recipe,) = report.recipes.to_dict("records")
    assert recipe["method"] == "block"
    assert recipe["is_best"]
    assert report.of("granularity").reference.unique().tolist() == ["block"]


def test_rows_without_their_space_have_recipes_without_yaml(tmp_path):
    rows = sweep_of(trials(flat), tmp_path)
    report = make_report("a", rows, load_units(tmp_path / "a"))
    assert report.recipes["yaml"].isna().all()
    assert report.missing == []


def test_several_sweeps_and_models_are_one_frame(tmp_path):
    first = sweep_of(trials(flat), tmp_path / "1")
    made = [
        one | {"trial_id": f"{500 + place:016x}", "model": "other"} for place, one in enumerate(trials(flat))
    ]
    second = sweep_of(made, tmp_path / "2")
    units = pd.concat([load_units(tmp_path / "1" / "a"), load_units(tmp_path / "2" / "a")])
    report = make_report("both", pd.concat([first, second], ignore_index=True), units)
    assert sorted(report.strata.values()) == ["builtin:pystdlib, sparsity 0.5", "other, sparsity 0.5"]
    assert report.comparisons.stratum.nunique() == 2


def test_a_sweep_with_its_dense_model_alone_is_a_report(tmp_path):
    report = make_report("a", sweep_of([row(0, "dense")], tmp_path), load_units(tmp_path / "a"))
    assert report.comparisons.empty
    assert report.settings.empty
    assert report.recipes.empty


def test_error_by_depth_is_that_of_the_blocks(tmp_path):
    rows = [row(1, calibration_seed=0, seed=0), row(2, calibration_seed=1, seed=1)]
    from raysweep.results.writer import write_rows

    for one, scale in zip(rows, (1.0, 3.0), strict=True):
        units = [
            {
                "kind": "block",
                "unit": str(block),
                "block": block,
                "linears": "",
                "error_after": scale * (block + 1),
            }
            for block in range(3)
        ]
        units.append({"kind": "unit", "unit": "0.mlp", "block": 0, "linears": "x", "error_after": 99.0})
        write_rows(tmp_path / "a", one, units, [])
    report = make_report("a", load_results(tmp_path / "a"), load_units(tmp_path / "a"))
    assert report.depth.block.tolist() == [0, 1, 2]
    assert report.depth.error.tolist() == [2.0, 4.0, 6.0]
    assert report.depth.low.tolist() == [1.0, 2.0, 3.0]
    assert report.depth.high.tolist() == [3.0, 6.0, 9.0]
    assert report.depth.method.unique().tolist() == ["subblock"]


def test_analysis_is_light():
    code = "import raysweep.analysis.report, sys; print({'torch', 'ray', 'statsmodels', 'matplotlib'} & {*sys.modules})"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "set()"


REPORTS = 1000


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("true", "wrong"), [(0.0, {BETTER, WORSE}), (0.1, {EQUIVALENT})])
def test_a_thousand_whole_sweeps_are_wrong_no_more_often_than_one_in_twenty(tmp_path, true, wrong):
    """Planted: criteria, granularities and retraining differ by `true`, each seed and trial by chance; where nothing
    differs by so much that little is shown to be equivalent."""
    frame = with_settings(
        sweep_of(trials(flat, range(4), criteria=("wanda", "sparsegpt"), retraining=True), tmp_path)
    )
    usable = tuned(frame).dropna(axis="columns", how="all")
    usable = usable[[name for name in usable if name in NEEDED]]
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        parts = [range(first, REPORTS, cores) for first in range(cores)]
        false = sum(pool.map(partial(_wrong_reports, usable, true, wrong), parts))
    assert false / REPORTS <= ALPHA + 2 * math.sqrt(ALPHA * (1 - ALPHA) / REPORTS)


def _wrong_reports(usable: pd.DataFrame, true: float, wrong: set[str], numbers: range) -> int:
    """How many of these reports say what is wrong of any comparison."""
    shifted = (usable.method != "subblock").astype(float) + (usable.criterion != "sparsegpt")
    noise, false = 0.03 if true else 0.3, 0
    gc.freeze()  # statsmodels collects garbage whenever it corrects
    for number in numbers:
        rng = np.random.default_rng([1, number])
        seeds = dict(zip(usable.repeat.unique(), rng.normal(0, 0.5, 4), strict=True))
        quality = 8.0 + usable.repeat.map(seeds) + true * shifted + rng.normal(0, noise, len(usable))
        found = judged(questions.all_questions(usable.assign(perplexity=quality, choice=quality), Margin()))
        assert len(found) == 6
        false += bool(set(found.verdict) & wrong)
    return false
