"""The table shows what varies and only that, in an order that compares, and hides no trial."""

from __future__ import annotations

import json
import random

import pytest

from raysweep.analysis.rows import failures, trial_label
from raysweep.analysis.table import LABELS, Summary, best_rows, fixed_columns, mask_groups, summary_table
from raysweep.config.labels import label_of
from raysweep.config.trial import Trial
from raysweep.errors import UsageError
from tests.analysis.rows import failed, plain, quickstart_rows, row


def labels(table: Summary) -> list[str]:
    return [name for name in table.columns if name in LABELS]


def told(table: Summary, *names: str) -> list[tuple[object, ...]]:
    """By row what these columns say."""
    return list(zip(*map(table.values, names), strict=True))


def test_dense_comes_first_then_mask_by_mask_the_pruned_row_and_its_recoveries(tmp_path):
    rows = plain(tmp_path, quickstart_rows())
    random.Random(1).shuffle(rows)
    table = summary_table(rows)
    assert told(table, "criterion", "recovery", "granularity") == [
        (None, "dense", None),
        ("magnitude/row", "none", None),
        ("magnitude/row", "reconstruct", "matrix"),
        ("magnitude/row", "reconstruct", "subblock"),
        ("magnitude/row", "reconstruct", "block"),
        ("wanda/row", "none", None),
        ("wanda/row", "reconstruct", "matrix"),
        ("wanda/row", "reconstruct", "subblock"),
        ("wanda/row", "reconstruct", "block"),
    ]
    assert mask_groups(table) == [0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_every_number_stays_with_its_trial(tmp_path):
    rows = plain(tmp_path, quickstart_rows())
    for sort in (None, "perplexity", "-granularity"):
        table = summary_table(rows, sort)
        assert {*told(table, "trial_id", "perplexity")} == {
            (one["trial_id"], one["perplexity"]) for one in rows
        }


def test_what_varies_is_a_column_and_the_rest_is_fixed(tmp_path):
    rows = plain(tmp_path, quickstart_rows())
    assert labels(summary_table(rows)) == ["criterion", "recovery", "granularity"]
    constants = fixed_columns(summary_table(rows))
    assert constants["model"] == "builtin:pystdlib"
    assert (constants["sparsity"], constants["learning_rate"], constants["calibration_num_samples"]) == (
        0.6,
        1e-3,
        64,
    )
    assert not {"criterion", "recovery", "granularity"} & set(constants)


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        ([{"sparsity": 0.5}, {"sparsity": 0.7}], ["sparsity"]),
        ([{"learning_rate": 1e-3}, {"learning_rate": 1e-2}], ["learning_rate"]),
        ([{"epochs": 1}, {"epochs": 2}], ["epochs"]),
        ([{"max_grad_norm": None}, {"max_grad_norm": 1.0}], ["max_grad_norm"]),
        ([{"trainable": "all"}, {"trainable": "weights"}], ["trainable"]),
        ([{"model": "a"}, {"model": "b"}], ["model"]),
        ([{"model_hash": "a"}, {"model_hash": "b"}], ["model_hash"]),
        ([{"model": "a", "model_hash": "a"}, {"model": "b", "model_hash": "b"}], ["model"]),
        ([{"dtype": "float32"}, {"dtype": "bfloat16"}], ["dtype"]),
        ([{"criterion": "wanda"}, {"criterion": "wanda", "comparison_group": "matrix"}], ["criterion"]),
        (
            [{"pattern": "unstructured"}, {"pattern": "2:4", "sparsity": 0.5}],
            ["sparsity", "pattern", "criterion"],
        ),
        ([{"pattern": "2:4", "sparsity": 0.5}, {"pattern": "1:4", "sparsity": 0.75}], ["pattern"]),
        ([{"calibration_seed": 0, "seed": 0}, {"calibration_seed": 1, "seed": 1}], ["calibration_seed"]),
        ([{"seed": 0}, {"seed": 1}], ["seed"]),
        ([{"calibration_num_samples": 8}, {"calibration_num_samples": 16}], ["calibration_num_samples"]),
        ([{"sparsity": 0.5}, {"sparsity": 0.5}], []),
    ],
    ids=str,
)
def test_a_field_that_varies_is_shown(tmp_path, columns, shown):
    rows = plain(tmp_path, [row(number, **one) for number, one in enumerate(columns)])
    assert [name for name in labels(summary_table(rows)) if name != "recovery"] == shown


def test_a_field_that_does_not_apply_to_some_trials_does_not_vary(tmp_path):
    rows = plain(
        tmp_path, [row(0, "dense"), row(1, "none", criterion="magnitude"), row(2, criterion="magnitude")]
    )
    assert labels(summary_table(rows)) == ["recovery"]


def test_seeds_and_learning_rates_come_after_the_granularity(tmp_path):
    grid = [(g, lr, seed) for g in ("subblock", "block") for lr in (1e-4, 1e-3) for seed in (0, 1)]
    made = [
        row(number, granularity=g, learning_rate=lr, calibration_seed=seed, seed=seed)
        for number, (g, lr, seed) in enumerate(grid)
    ]
    random.Random(0).shuffle(made)
    table = summary_table(plain(tmp_path, made))
    assert told(table, "granularity", "learning_rate", "calibration_seed") == grid


def test_models_keep_their_order_and_each_begins_with_its_dense_row(tmp_path):
    made = [
        row(0, "dense", model="z"),
        row(1, "none", model="z"),
        row(2, "dense", model="a"),
        row(3, "none", model="a"),
    ]
    table = summary_table(plain(tmp_path, made))
    assert told(table, "model", "recovery") == [("z", "dense"), ("z", "none"), ("a", "dense"), ("a", "none")]


def test_sorting_by_any_column_in_both_directions(tmp_path):
    rows = plain(tmp_path, quickstart_rows())
    perplexities = sorted(one["perplexity"] for one in rows)
    assert summary_table(rows, "perplexity").values("perplexity") == perplexities
    assert summary_table(rows, "-perplexity").values("perplexity") == perplexities[::-1]
    for sort in ("learning_rate", "-learning_rate"):  # where it does not apply comes last
        assert summary_table(rows, sort).values("recovery")[:6] == ["reconstruct"] * 6
    by_seconds = summary_table(rows, "seconds_total")
    assert "seconds_total" in by_seconds.columns
    assert len(by_seconds.rows) == len(rows)


def test_an_unknown_column_to_sort_by_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(UsageError) as caught:
        summary_table(plain(tmp_path, quickstart_rows()), "perplexty")
    assert caught.value.nearest == "perplexity"


def test_other_evaluation_entries_have_columns_of_their_own(tmp_path):
    made = [row(n, perplexity_first=10.0 + n, perplexity_second=3.0) for n in range(2)]
    table = summary_table(plain(tmp_path, made))
    assert [name for name in table.columns if name.startswith("perplexity")] == [
        "perplexity",
        "perplexity_second",
    ]


def test_rows_that_were_measured_differently_say_so(tmp_path):
    def protocol(windows: int) -> str:
        entry = {"name": "wikitext", "sequence_length": 256, "max_windows": windows}
        return json.dumps({"perplexity": [entry]})

    made = [row(n, evaluation_protocol=protocol(2 + n)) for n in range(2)]
    table = summary_table(plain(tmp_path, made))
    assert table.values("evaluation") == ["wikitext 2 x 256", "wikitext 3 x 256"]


def test_failed_trials_are_listed_with_their_reason_instead(tmp_path):
    made = [
        row(0),
        failed(1, "perplexity is inf", learning_rate=10.0),
        failed(2, "lost", criterion="random", seed=3),
    ]
    rows = plain(tmp_path, made)
    assert summary_table(rows).values("perplexity") == [10.0]
    assert failures(rows) == [
        ("wanda/row 0.6 subblock lr=10", "perplexity is inf"),
        ("random/row 0.6 subblock lr=0.001 seed=3", "lost"),
    ]


def test_a_sweep_with_nothing_but_failures_has_an_empty_table(tmp_path):
    rows = plain(tmp_path, [failed(0, "lost")])
    assert not summary_table(rows).rows
    assert len(failures(rows)) == 1


def test_labels_of_rows_are_those_of_their_trials(tmp_path):
    made = [
        row(0, "dense"),
        row(1, "none", criterion="magnitude", pattern="2:4", sparsity=0.5),
        row(2, epochs=3, max_grad_norm=0.5, shuffle=False),
        row(3, calibration_seed=2, seed=2),
    ]
    expected = [
        label_of(Trial.dense()),
        "magnitude 2:4",
        "wanda/row 0.6 subblock lr=0.001 epochs=3 shuffle=false max_grad_norm=0.5",
        "wanda/row 0.6 subblock lr=0.001 seed=2 calibration.seed=2",
    ]
    assert [trial_label(one) for one in plain(tmp_path, made)] == expected


def test_the_best_of_a_cell_is_what_a_plain_loop_finds(tmp_path):
    rng = random.Random(0)
    made = [
        row(n, recovery, sparsity=sparsity, validation_perplexity=rng.uniform(5, 9))
        for n, (recovery, sparsity) in enumerate(
            (recovery, sparsity)
            for _ in range(5)
            for recovery in ("none", "reconstruct")
            for sparsity in (0.5, 0.6)
        )
    ]
    made += [
        row(100, "dense", validation_perplexity=1.0),
        failed(101, "lost", sparsity=0.5) | {"validation_perplexity": 1.0},
    ]
    made += [failed(102, "lost", sparsity=0.6) | {"validation_perplexity": 99.0}]
    rows = plain(tmp_path, made)
    for mode, better in (("min", min), ("max", max)):
        expected = set()
        for recovery in ("none", "reconstruct"):
            for sparsity in (0.5, 0.6):
                cell = [
                    one
                    for one in made
                    if (one["recovery"], one["sparsity"], one["status"]) == (recovery, sparsity, "finished")
                ]
                expected.add(better(cell, key=lambda one: one["validation_perplexity"])["trial_id"])
        cell_columns = ("model", "sparsity", "pattern", "recovery")
        assert best_rows(rows, "validation_perplexity", mode, cell_columns) == expected


def test_steps_do_not_vary_because_exact_trials_have_none(tmp_path):
    rows = [row(0, granularity="matrix"), row(1, granularity="matrix", optimizer="exact", learning_rate=None)]
    shown = labels(summary_table(plain(tmp_path, rows)))
    assert "optimizer" in shown
    assert not {"epochs", "batch_size", "shuffle", "warmup_fraction", "learning_rate"} & set(shown)
    rows.append(row(2, granularity="matrix", trainable="lora"))
    shown = labels(summary_table(plain(tmp_path, rows)))
    assert "trainable" in shown
    assert not {"lora_rank", "lora_alpha"} & set(shown)


def test_windows_come_by_their_length_and_the_model_last(tmp_path):
    order = ["matrix", "subblock", "block", "window:2", "window:10", "model"]
    rows = [row(number, granularity=order[place]) for number, place in enumerate((5, 4, 2, 3, 0, 1))]
    assert summary_table(plain(tmp_path, rows)).values("granularity") == order


def test_stopped_trials_have_no_numbers_to_show(tmp_path):
    stopped = row(1, learning_rate=1e-2, status="stopped", stopped_at=0.25, perplexity=None)
    table = summary_table(plain(tmp_path, [row(0), stopped | {"validation_perplexity": None}]))
    assert table.values("trial_id") == [f"{0:016x}"]
