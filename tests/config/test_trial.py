"""Trials are settled: defaults filled in, null where a field cannot matter, impossible ones refused."""

import pickle
from itertools import product

import pytest
from pydantic import ValidationError

from raysweep.config.field_groups import RECOVERY_FIELDS
from raysweep.config.labels import label_of
from raysweep.config.spellings import parse_pattern
from raysweep.config.trial import Trial
from raysweep.errors import UsageError

MASK = {"criterion": "wanda", "sparsity": 0.6}
RECONSTRUCT = {"recovery": "reconstruct", **MASK, "granularity": "block", "learning_rate": 1e-3}


def test_a_pruned_trial_has_no_recovery_fields():
    trial = Trial(**{**RECONSTRUCT, "recovery": "none", "epochs": 5, "seed": 3})
    assert trial == Trial(recovery="none", **MASK)
    assert all(getattr(trial, name) is None for name in RECOVERY_FIELDS)
    assert trial.seed is None


def test_defaults_of_the_contract():
    trial = Trial(**RECONSTRUCT)
    expected = {
        "pattern": "unstructured",
        "comparison_group": "row",
        "statistics_stream": "dense",
        "input_stream": "dense",
        "target_stream": "dense",
        "loss": "mse",
        "trainable": "all",
        "optimizer": "adamw",
        "epochs": 1,
        "batch_size": 2,
        "shuffle": True,
        "warmup_fraction": 0.1,
        "max_grad_norm": None,
        "seed": 0,
    }
    assert {name: getattr(trial, name) for name in expected} == expected
    assert trial == Trial(**RECONSTRUCT, **expected)


@pytest.mark.parametrize(
    ("fields", "seed"),
    [
        ({"recovery": "none", "criterion": "wanda"}, None),
        ({"recovery": "none", "criterion": "random"}, 7),
        ({"criterion": "wanda", "shuffle": True}, 7),
        ({"criterion": "wanda", "shuffle": False}, None),
        ({"criterion": "random", "shuffle": False}, 7),
    ],
)
def test_the_seed_is_kept_where_it_matters(fields, seed):
    assert Trial(**{**RECONSTRUCT, **fields, "seed": 7}).seed == seed


@pytest.mark.parametrize(("criterion", "stream"), [("magnitude", None), ("random", None), ("wanda", "dense")])
def test_statistics_matter_to_criteria_that_use_them(criterion, stream):
    assert Trial(recovery="none", criterion=criterion, sparsity=0.5).statistics_stream == stream


def test_patterns_fix_the_sparsity_and_have_no_group():
    trial = Trial(recovery="none", criterion="wanda", pattern="2:4", comparison_group="matrix")
    assert (trial.sparsity, trial.comparison_group, trial.group_size) == (0.5, None, (2, 4))
    assert trial == Trial(recovery="none", criterion="wanda", pattern="02:04", sparsity=0.5)
    assert Trial(recovery="none", criterion="wanda", pattern="2:3", sparsity=0.333333333333).sparsity == 1 / 3


def test_a_contradicting_sparsity_is_refused():
    with pytest.raises(UsageError, match=r"sparsity 0.6 contradicts pattern 2:4") as caught:
        Trial(recovery="none", criterion="wanda", pattern="2:4", sparsity=0.6)
    assert caught.value.where == "sparsity"
    assert "0.5" in caught.value.allowed


@pytest.mark.parametrize("missing", ["criterion", "sparsity", "granularity", "learning_rate"])
def test_what_is_needed_is_asked_for(missing):
    fields = {name: value for name, value in RECONSTRUCT.items() if name != missing}
    with pytest.raises(UsageError, match=f"{missing} is missing") as caught:
        Trial(**fields)
    assert caught.value.where == missing


def test_parse_pattern():
    assert parse_pattern("unstructured") is None
    assert parse_pattern("2:4") == (2, 4)
    for text in ("4:4", "5:4", "0:4", "2", "2:", "a:b", "-2:4", "2:4:8", "", "2:99999"):
        with pytest.raises(UsageError) as caught:
            parse_pattern(text)
        assert "N:M" in caught.value.allowed


def test_the_dense_trial_is_nothing_but_dense():
    assert {name for name, value in Trial.dense() if value is not None} == {"recovery"}
    assert Trial.dense() == Trial(recovery="dense", criterion="wanda", sparsity=0.5, seed=3)


def test_trials_are_frozen_hashable_and_picklable():
    trial = Trial(**RECONSTRUCT)
    with pytest.raises(ValidationError):
        trial.epochs = 3
    assert {trial: 1}[Trial(**RECONSTRUCT)] == 1
    assert pickle.loads(pickle.dumps(trial)) == trial


def test_a_settled_trial_settles_to_itself():
    criteria = ("magnitude", "random", "wanda", "ria", "sparsegpt")
    for recovery, criterion, pattern in product(("none", "reconstruct"), criteria, ("unstructured", "1:4")):
        given = {"recovery": recovery, "criterion": criterion, "pattern": pattern, "sparsity": 0.75}
        trial = Trial(**{**RECONSTRUCT, **given})
        assert Trial(**trial.model_dump()) == trial
        assert Trial(**{name: value for name, value in trial if value is not None}) == trial


def test_identity_leaves_constant_defaults_out():
    assert Trial(**RECONSTRUCT).identity() == {**RECONSTRUCT, "seed": 0}
    assert Trial(**RECONSTRUCT, epochs=2).identity() == {**RECONSTRUCT, "seed": 0, "epochs": 2}


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({}, "wanda/row 0.6 block lr=0.001"),
        ({"criterion": "magnitude", "comparison_group": "matrix"}, "magnitude/matrix 0.6 block lr=0.001"),
        ({"recovery": "none", "pattern": "2:4", "sparsity": None}, "wanda 2:4"),
        ({"epochs": 5, "shuffle": False}, "wanda/row 0.6 block lr=0.001 epochs=5 shuffle=false"),
        ({"seed": 2}, "wanda/row 0.6 block lr=0.001 seed=2"),
    ],
)
def test_labels(fields, label):
    assert label_of(Trial(**{**RECONSTRUCT, **fields})) == label


EXACT = {**RECONSTRUCT, "granularity": "matrix", "optimizer": "exact", "learning_rate": None}


@pytest.mark.parametrize(
    ("fields", "where", "said"),
    [
        ({**EXACT, "loss": "cosine"}, "loss", "least squares problem of one matrix; loss is 'cosine'"),
        ({**EXACT, "granularity": "block"}, "granularity", "granularity is 'block'"),
        ({**EXACT, "trainable": "lora"}, "trainable", "trainable is 'lora'"),
        ({**RECONSTRUCT, "target_stream": "pruned"}, "target_stream", "needs a pruned input"),
        (
            {"recovery": "none", **MASK, "statistics_stream": "recovered"},
            "statistics_stream",
            "needs recovery .reconstruct.",
        ),
        (
            {**RECONSTRUCT, "criterion": "sparsegpt", "comparison_group": "matrix"},
            "comparison_group",
            "does not apply to sparsegpt",
        ),
        (
            {"recovery": "none", "criterion": "sparsegpt", "pattern": "3:5"},
            "column_block",
            "128 cannot be cut into groups of 5",
        ),
        ({**RECONSTRUCT, "granularity": "window:0"}, "granularity", "no granularity"),
        ({**RECONSTRUCT, "granularity": "windows:2"}, "granularity", "no granularity"),
        ({**RECONSTRUCT, "criterion": "wnda"}, "criterion", "no criterion"),
        ({**RECONSTRUCT, "criterion": "file:"}, "criterion", "no criterion"),
        ({**RECONSTRUCT, "targets": ("re:(",)}, None, "no pattern of names"),
    ],
)
def test_impossible_combinations_are_refused_with_what_is_possible(fields, where, said):
    with pytest.raises(UsageError, match=said) as caught:
        Trial(**fields)
    assert caught.value.where == where
    assert caught.value.allowed


def test_an_exact_trial_has_no_steps():
    trial = Trial(**EXACT, epochs=5, batch_size=9, shuffle=True)
    assert trial == Trial(**EXACT)
    steps = ("learning_rate", "epochs", "batch_size", "shuffle", "warmup_fraction", "max_grad_norm", "seed")
    assert all(getattr(trial, name) is None for name in steps)
    assert label_of(trial) == "wanda/row 0.6 matrix exact"


@pytest.mark.parametrize(
    ("fields", "applies"),
    [
        ({"criterion": "sparsegpt"}, {"dampening": 0.01, "column_block": 128, "statistics_stream": "dense"}),
        ({"criterion": "ria"}, {"ria_power": 0.5, "statistics_stream": "dense", "comparison_group": "row"}),
        ({"criterion": "my.module:score"}, {"statistics_stream": "dense", "comparison_group": "row"}),
        ({"criterion": "magnitude"}, {"comparison_group": "row"}),
        ({"trainable": "lora"}, {"lora_rank": 16, "lora_alpha": 32.0, "statistics_stream": "dense"}),
    ],
)
def test_fields_are_null_where_they_do_not_apply(fields, applies):
    trial = Trial(**{**RECONSTRUCT, **fields})
    for name in (
        "dampening",
        "column_block",
        "ria_power",
        "statistics_stream",
        "lora_rank",
        "lora_alpha",
    ):
        assert getattr(trial, name) == applies.get(name)


def test_a_matrix_has_no_norms():
    fields = {**RECONSTRUCT, "granularity": "matrix", "learning_rate": 0.01}
    assert Trial(**fields, trainable="lora+norms") == Trial(**fields, trainable="lora")


def test_masks_from_a_file_say_all_about_themselves():
    trial = Trial(recovery="none", criterion="file:masks.safetensors", sparsity=0.5, pattern="2:4", seed=3)
    assert trial == Trial(recovery="none", criterion="file:masks.safetensors")
    assert label_of(trial) == "file:masks.safetensors"


def test_sparsity_by_name_keeps_its_order():
    given = {"re:.*mlp": 0.6, "q_proj": 0.3}
    trial = Trial(recovery="none", criterion="wanda", sparsity=given)
    assert trial.sparsity == (("re:.*mlp", 0.6), ("q_proj", 0.3))
    assert trial != Trial(recovery="none", criterion="wanda", sparsity={"q_proj": 0.3, "re:.*mlp": 0.6})
    assert label_of(trial) == "wanda/row re:.*mlp=0.6,q_proj=0.3"
    assert trial.columns()["sparsity"] is None


def test_one_block_at_a_time_is_a_block():
    assert Trial(**{**RECONSTRUCT, "granularity": "window:1"}) == Trial(**RECONSTRUCT)
    assert Trial(**{**RECONSTRUCT, "granularity": "window:02"}).granularity == "window:2"


@pytest.mark.parametrize(
    "fields",
    [
        RECONSTRUCT,
        EXACT,
        {**RECONSTRUCT, "targets": ("up_proj", "re:.*a,b{1,2}"), "ignore": ("q_proj",)},
        {**RECONSTRUCT, "sparsity": {"up_proj": 0.5, "re:.*": 0.25}},
        {"recovery": "none", "criterion": "file:a.safetensors"},
        {"recovery": "dense"},
    ],
)
def test_a_trial_is_told_from_the_columns_of_its_row(fields):
    trial = Trial(**fields)
    columns = {name: value for name, value in trial.columns().items() if value is not None}
    assert all(isinstance(value, str | float | int | bool) for value in columns.values())
    assert Trial.from_columns(columns) == trial
