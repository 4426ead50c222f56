"""Planted effects are found, and what is not there is not."""

from __future__ import annotations

import zlib

import numpy as np
import pandas as pd
import pytest

from raysweep.analysis import questions
from raysweep.analysis.ladder import tuned
from raysweep.analysis.paired import BETTER, EQUIVALENT, UNDECIDED, WORSE, Margin, judged
from raysweep.analysis.questions import AFTER, BEFORE, EQUAL_COMPUTE, EQUAL_DATA, GRANULARITY
from raysweep.analysis.settings import mask_words, stratum_words, with_settings
from tests.analysis.rows import row
from tests.analysis.synthetic import GRANULARITIES, sweep_of, trials, verdicts

MARGIN = Margin(0.1, 0.01)
BEFORE_RECOVERY = {"magnitude": 60.0, "wanda": 30.0, "sparsegpt": 20.0}
BY_GRANULARITY = {"matrix": 13.0, "subblock": 10.0, "block": 10.02, "model": 10.02}
SEEDS = (0, 1, 2, 3)


def noise(*key, size=0.01):
    return size * np.random.default_rng(zlib.crc32(repr(key).encode())).standard_normal()


def planted(trial):
    """Seeds move all trials together, criteria matter before recovery alone, matrices are worse, blocks are not."""
    shared = 0.5 * trial["seed"]
    own = noise(*sorted((name, str(value)) for name, value in trial.items()))
    if trial["recovery"] == "none":
        return BEFORE_RECOVERY[trial["criterion"]] + shared + own
    return BY_GRANULARITY.get(trial.get("granularity"), 11.0) + shared + own


def usable(rows, tmp_path):
    return tuned(with_settings(sweep_of(rows, tmp_path)))


@pytest.fixture
def rows(tmp_path):
    return usable(trials(planted, SEEDS), tmp_path)


def test_granularities_are_compared_with_subblocks_over_all_criteria(rows):
    found = judged(questions.granularity(rows, MARGIN))
    assert verdicts(found) == {(GRANULARITY, "matrix"): WORSE, (GRANULARITY, "block"): EQUIVALENT}
    assert found.reference.unique().tolist() == ["subblock"]
    assert (found.contexts == 3).all()
    assert (found.seeds == len(SEEDS)).all()
    assert (found.missing == 0).all()
    by_hand = rows[rows.granularity.notna()].pivot_table(
        index="calibration_seed", columns="granularity", values="perplexity"
    )
    one = found.set_index("value").loc["matrix"]
    assert one.difference == pytest.approx((by_hand.matrix - by_hand.subblock).mean())
    assert one["mean"] == pytest.approx(by_hand.matrix.mean())
    assert one.spread == pytest.approx((by_hand.matrix - by_hand.subblock).std())


def test_criteria_differ_before_recovery_and_not_after_it(rows):
    found = verdicts(judged(questions.criteria(rows, MARGIN)))
    for criterion in ("magnitude/row", "wanda/row"):
        assert found[BEFORE, criterion] == WORSE
        assert found[AFTER, criterion] == EQUIVALENT


def test_without_sparsegpt_the_best_before_recovery_is_the_reference(tmp_path):
    rows = usable(trials(planted, SEEDS, criteria=("magnitude", "wanda")), tmp_path)
    found = questions.criteria(rows, MARGIN)
    assert found.reference.unique().tolist() == ["wanda/row"]
    assert verdicts(judged(found))[BEFORE, "magnitude/row"] == WORSE


def test_without_subblocks_the_best_by_validation_is_the_reference(tmp_path):
    rows = usable(trials(planted, SEEDS, granularities=("matrix", "block")), tmp_path)
    assert questions.granularity(rows, MARGIN).reference.tolist() == ["block"]


def test_a_reference_may_be_named(rows):
    assert set(questions.granularity(rows, MARGIN, "block").value) == {"matrix", "subblock"}


def test_strata_are_apart(tmp_path):
    rows = usable(trials(planted, SEEDS, sparsities=(0.5, 0.6)), tmp_path)
    found = questions.granularity(rows, MARGIN)
    words = stratum_words(rows)
    assert found.stratum.map(words).value_counts().to_dict() == {"sparsity 0.5": 2, "sparsity 0.6": 2}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"sparsity": 0.6, "pattern": "unstructured"}, "sparsity 0.6"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "2:4"),
        ({"sparsity_by_name": '{"mlp": 0.7}', "pattern": "unstructured"}, 'sparsity {"mlp": 0.7}'),
        ({"criterion": "file:masks.safetensors"}, "masks from files"),
    ],
)
def test_a_mask_is_named_by_what_decides_its_zeros(columns, words):
    assert mask_words(columns) == words


def test_too_few_seeds_decide_nothing(tmp_path):
    rows = usable(trials(planted, seeds=(0,)), tmp_path)
    found = judged(questions.granularity(rows, MARGIN))
    assert set(found.verdict) == {UNDECIDED}
    assert found.low.isna().all()


def test_a_missing_trial_is_counted_and_a_failed_one_is_missing(tmp_path):
    made = trials(planted, SEEDS)
    gone = next(one for one in made if one.get("granularity") == "block" and one["calibration_seed"] == 1)
    broken = next(one for one in made if one.get("granularity") == "matrix" and one["calibration_seed"] == 2)
    broken |= {"status": "failed", "perplexity": None, "validation_perplexity": None, "error": "nan"}
    rows = usable([one for one in made if one is not gone], tmp_path)
    found = judged(questions.granularity(rows, MARGIN)).set_index("value")
    assert found.missing.to_dict() == {"matrix": 1, "block": 1}
    assert found.verdict.to_dict() == {"matrix": WORSE, "block": EQUIVALENT}


def test_two_that_share_no_seed_are_not_compared(tmp_path):
    made = [
        one
        for one in trials(planted, (0, 1))
        if one.get("granularity") != "block" or one["calibration_seed"] == 0
        if one.get("granularity") != "subblock" or one["calibration_seed"] == 1
    ]
    found = judged(questions.granularity(usable(made, tmp_path), MARGIN)).set_index("value").loc["block"]
    assert (found.seeds, found.missing, found.verdict) == (0, 6, UNDECIDED)


def test_an_exact_recovery_is_paired_though_it_has_no_steps(tmp_path):
    """Of the settings that it could be paired with, here two numbers of epochs, the best one by validation stands."""
    made = trials(planted, SEEDS, criteria=("wanda",), granularities=("subblock",))
    more = [
        one
        | {"trial_id": f"{900 + place:016x}", "epochs": 3, "perplexity": one["perplexity"] - 1.0}
        | {"validation_perplexity": one["validation_perplexity"] - 1.0}
        for place, one in enumerate(made)
        if one["recovery"] == "reconstruct"
    ]
    exact = [
        row(
            500 + seed,
            granularity="matrix",
            optimizer="exact",
            learning_rate=None,
            sparsity=0.5,
            calibration_seed=seed,
            perplexity=10.5 + 0.5 * seed,
        )
        for seed in SEEDS
    ]
    (found,) = judged(questions.granularity(usable([*made, *more, *exact], tmp_path), MARGIN)).to_dict(
        "records"
    )
    assert (found["value"], found["seeds"], found["verdict"]) == ("matrix exact", len(SEEDS), WORSE)
    assert found["difference"] == pytest.approx(1.5, abs=0.05)


def test_the_effect_of_a_field_is_seen_where_all_else_is_equal(tmp_path):
    def quality(trial):
        return (
            planted(trial) - (0.8 if trial["granularity"] == "subblock" else 0.0)
            if "granularity" in trial
            else 30.0
        )

    dense = trials(planted, SEEDS, criteria=("wanda",))
    own = [one for one in trials(quality, SEEDS, criteria=("wanda",)) if one.get("granularity") == "subblock"]
    pruned = [
        one | {"trial_id": f"{700 + place:016x}", "input_stream": "pruned"} for place, one in enumerate(own)
    ]
    (found,) = judged(questions.effects(usable([*dense, *pruned], tmp_path), MARGIN)).to_dict("records")
    assert (found["question"], found["value"], found["reference"]) == (
        "stream of the inputs",
        "pruned",
        "dense",
    )
    assert (found["verdict"], found["contexts"]) == (BETTER, 1)
    assert found["difference"] == pytest.approx(-0.8, abs=0.05)


def costly(seconds, tokens=4096):
    return {"device_seconds_standalone": seconds, "tokens_unique": tokens}


def test_retraining_is_compared_at_equal_data_and_at_equal_compute(tmp_path):
    """Recovered perplexity 10; retrained on the same tokens 11 for five times the seconds, on few tokens 12 for as many
    seconds."""
    made = trials(
        planted, SEEDS, criteria=("wanda", "magnitude"), granularities=("subblock",), **costly(10.0)
    )
    for criterion in ("wanda", "magnitude"):
        for seed in SEEDS:
            for number, (quality, cost) in enumerate(
                ((11.0, costly(50.0)), (12.0, costly(11.0, tokens=512)))
            ):
                measured = quality + 0.5 * seed + noise(criterion, seed, number)
                made.append(
                    row(
                        1000 + len(made),
                        "retrain",
                        criterion=criterion,
                        sparsity=0.5,
                        calibration_seed=seed,
                        seed=seed,
                        learning_rate=1e-4,
                        epochs=number + 1,
                        perplexity=measured,
                        validation_perplexity=measured,
                        **cost,
                    )
                )
    rows = usable(made, tmp_path)
    found = judged(questions.retraining(rows, MARGIN)).set_index("question")
    assert found.verdict.to_dict() == {EQUAL_DATA: BETTER, EQUAL_COMPUTE: BETTER}
    assert found.difference.to_dict() == pytest.approx({EQUAL_DATA: -1.0, EQUAL_COMPUTE: -2.0}, abs=0.05)
    assert found.value.unique().tolist() == ["reconstruction (subblock)"]
    assert (found.contexts == 2).all()
    ratios = questions.cost_ratios(rows).set_index("cost")
    assert ratios.ratio["device_seconds_standalone"] == pytest.approx(5.0)
    assert ratios.ratio["tokens_unique"] == pytest.approx(1.0)
    assert (ratios.pairs == 8).all()


def test_retraining_of_another_cost_is_no_comparison(tmp_path):
    made = trials(planted, SEEDS, retraining=True, **costly(10.0))
    for one in made:
        if one["recovery"] == "retrain":
            one |= costly(30.0, tokens=9000)
    rows = usable(made, tmp_path)
    assert questions.retraining(rows, MARGIN).empty
    assert set(questions.cost_ratios(rows).ratio.round(2)) >= {3.0, 2.2}


def test_costs_are_means_over_masks_and_seeds(rows):
    found = questions.costs(rows).set_index("method")
    assert found.index.tolist() == ["pruned only", *GRANULARITIES]
    assert (found.trials == 12).all()
    assert found.perplexity["matrix"] == pytest.approx(rows[rows.granularity == "matrix"].perplexity.mean())


@pytest.mark.parametrize("kinds", [("dense",), ("dense", "none"), ("reconstruct",), ()])
def test_what_is_not_there_is_not_answered(tmp_path, kinds):
    made = [
        one
        for one in trials(planted, SEEDS, granularities=("subblock",))
        if one["recovery"] in ("dense", *kinds)
    ]
    made = made if kinds else made[:1]
    rows = usable(made, tmp_path)
    for question in (questions.granularity, questions.retraining, questions.effects):
        assert question(rows, MARGIN).empty
    assert isinstance(judged(questions.criteria(rows, MARGIN)), pd.DataFrame)
