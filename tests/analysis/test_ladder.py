"""The best learning rate of a setting is that of its mean over shared seeds, and one at the edge is told."""

from __future__ import annotations

from raysweep.analysis.ladder import best_learning_rates, edges, learning_rate_curves, tuned
from raysweep.analysis.settings import setting_labels, with_settings
from tests.analysis.rows import failed, row
from tests.analysis.synthetic import sweep_of


def ladder(values, seed=0, start=1, **fields):
    """Rows of a setting at these learning rates."""
    return [
        row(
            start + place,
            learning_rate=rate,
            calibration_seed=seed,
            seed=seed,
            validation_perplexity=value,
            **fields,
        )
        for place, (rate, value) in enumerate(values.items())
    ]


def best_of(rows, tmp_path):
    frame = with_settings(sweep_of([row(0, "dense"), *rows], tmp_path))
    labels = setting_labels(frame)
    return {labels[one["setting"]]: one for one in best_learning_rates(frame).to_dict("records")}


def test_the_best_is_found_and_placed(tmp_path):
    rows = ladder({1e-4: 9.0, 1e-3: 7.0, 1e-2: 8.0})
    rows += ladder({1e-4: 7.0, 1e-3: 8.0}, start=10, granularity="block")
    rows += ladder({1e-4: 9.0, 1e-3: 8.0}, start=20, granularity="matrix")
    rows += ladder({1e-3: 8.0}, start=30, granularity="model")
    found = best_of(rows, tmp_path)
    assert {
        label.split()[2]: (one["learning_rate"], one["place"], one["tried"]) for label, one in found.items()
    } == {
        "subblock": (1e-3, "inside", 3),
        "block": (1e-4, "lowest", 2),
        "matrix": (1e-3, "highest", 2),
        "model": (1e-3, "only one", 1),
    }
    frame = with_settings(sweep_of(rows, tmp_path / "again"))
    assert len(list(edges(best_learning_rates(frame)))) == 2


def test_means_are_over_the_seeds_that_all_have(tmp_path):
    """The ladder was tried on one seed; that the best one alone has hard seeds more does not count against it."""
    rows = ladder({1e-4: 9.0, 1e-3: 7.0, 1e-2: 8.0})
    rows += ladder({1e-3: 20.0}, seed=1, start=10) + ladder({1e-3: 20.0}, seed=2, start=20)
    (one,) = best_of(rows, tmp_path).values()
    assert (one["learning_rate"], one["mean"], one["seeds"]) == (1e-3, 7.0, 1)


def test_means_over_several_seeds_decide(tmp_path):
    rows = ladder({1e-3: 7.0, 1e-2: 7.4}) + ladder({1e-3: 9.0, 1e-2: 7.6}, seed=1, start=10)
    (one,) = best_of(rows, tmp_path).values()
    assert (one["learning_rate"], one["mean"], one["seeds"]) == (1e-2, 7.5, 2)


def test_orders_of_steps_on_one_calibration_set_are_averaged(tmp_path):
    """Seeds of trials crossed with those of calibration sets: neither the first one nor their number decides."""
    rows = ladder({1e-3: 7.0, 1e-2: 7.4}, seed=1) + ladder({1e-3: 7.0, 1e-2: 7.4}, seed=2, start=10)
    rows += [
        one
        | {"trial_id": f"{50 + n:016x}", "seed": 9}
        | {"validation_perplexity": 9.0 if n % 2 == 0 else 7.4}
        for n, one in enumerate(rows)
    ]
    (one,) = best_of(rows, tmp_path).values()
    assert (one["learning_rate"], one["mean"], one["seeds"]) == (1e-2, 7.4, 2)


def test_of_equal_ones_the_smallest(tmp_path):
    (one,) = best_of(ladder({1e-2: 7.0, 1e-4: 7.0, 1e-3: 7.0}), tmp_path).values()
    assert (one["learning_rate"], one["place"]) == (1e-4, "lowest")


def test_one_that_diverged_is_worse_and_bounds_the_ladder(tmp_path):
    rows = ladder({1e-4: 9.0, 1e-3: 7.0})
    rows.append(failed(5, "the loss is inf", learning_rate=1e-2, seed=0) | {"error_kind": "numerical"})
    (one,) = best_of(rows, tmp_path).values()
    assert (one["learning_rate"], one["place"], one["tried"]) == (1e-3, "inside", 3)
    frame = with_settings(sweep_of(rows, tmp_path / "again"))
    assert learning_rate_curves(frame).diverged.tolist() == [0, 0, 1]


def test_a_setting_of_which_all_diverged_has_no_best(tmp_path):
    rows = [failed(5, "nan", learning_rate=1e-2, seed=0) | {"error_kind": "numerical"}]
    assert best_of(rows, tmp_path) == {}


def test_tuned_rows_are_those_at_the_best_and_those_without_steps(tmp_path):
    rows = [row(0, "dense"), row(1, "none"), *ladder({1e-4: 9.0, 1e-3: 7.0}, start=2)]
    rows += ladder({1e-3: 7.5}, seed=1, start=10)
    rows.append(row(20, granularity="matrix", optimizer="exact", learning_rate=None))
    frame = with_settings(sweep_of(rows, tmp_path))
    chosen = tuned(frame)
    assert sorted(chosen.trial_id.str[-2:]) == ["01", "03", "0a", "14"]


def test_higher_may_be_better(tmp_path):
    frame = with_settings(sweep_of(ladder({1e-4: 0.3, 1e-3: 0.5, 1e-2: 0.4}), tmp_path))
    (one,) = best_learning_rates(frame, mode="max").to_dict("records")
    assert (one["learning_rate"], one["place"]) == (1e-3, "inside")
