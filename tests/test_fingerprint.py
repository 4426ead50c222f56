"""Identities: equal for equal contents however written, different for anything that changes numbers."""

import hashlib
import json
import math
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.config.space import SearchSpace
from raysweep.config.trial import Trial
from raysweep.errors import RaysweepError
from raysweep.fingerprint import (
    NUMERICS_VERSION,
    canonical_json,
    fingerprint,
    is_identity,
    recovery_id,
    trial_id,
)

RECONSTRUCT = {
    "recovery": "reconstruct",
    "criterion": "wanda",
    "sparsity": 0.6,
    "granularity": "block",
    "learning_rate": 1e-3,
}
MASK = {"recovery": "none", "criterion": "wanda", "sparsity": 0.6}


def identity(trial, model="m", dtype="float32", calibration="c"):
    return recovery_id(trial, model, dtype, calibration)


def test_an_identity_by_hand():
    """Of SHA-256 and the standard library's JSON alone, as the document says."""
    content = {
        "calibration": "c",
        "dtype": "float32",
        "model": "m",
        "numerics": NUMERICS_VERSION,
        "trial": {"criterion": "wanda", "recovery": "none", "sparsity": 0.6},
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert identity(Trial(**MASK)) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_identities_of_this_numerics_version_never_change():
    """A failure means that every stored sweep would run again: mend it, or raise NUMERICS_VERSION."""
    assert NUMERICS_VERSION == 1
    weights = identity(Trial(**RECONSTRUCT))
    assert weights == "685660e3fb1d4ba9"
    assert (
        trial_id(weights, {"perplexity": [{"name": "x", "sequence_length": 64}]}, {"x": "h"})
        == "9b787670fedcd9ba"
    )


OTHERS = {
    "recovery": "none",
    "criterion": "magnitude",
    "sparsity": 0.7,
    "pattern": "2:5",
    "comparison_group": "matrix",
    "granularity": "matrix",
    "trainable": "weights",
    "learning_rate": 1e-2,
    "epochs": 2,
    "batch_size": 4,
    "shuffle": False,
    "warmup_fraction": 0.0,
    "max_grad_norm": 1.0,
    "seed": 1,
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_field_changes_the_identity(name):
    base = {**RECONSTRUCT, "sparsity": 0.6}
    assert identity(Trial(**{**base, name: OTHERS[name]})) != identity(Trial(**base))


def test_contents_change_the_identity():
    trial = Trial(**MASK)
    others = [identity(trial, model="n"), identity(trial, dtype="bfloat16"), identity(trial, calibration="d")]
    assert len({identity(trial), *others}) == 4


@given(st.permutations(list(RECONSTRUCT)))
def test_the_order_of_fields_does_not_matter(order):
    assert identity(Trial(**{name: RECONSTRUCT[name] for name in order})) == identity(Trial(**RECONSTRUCT))


DEFAULTS = {
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


@given(st.sets(st.sampled_from(sorted(DEFAULTS))))
def test_defaults_written_out_do_not_matter(names):
    spelled = {name: DEFAULTS[name] for name in names}
    assert identity(Trial(**RECONSTRUCT, **spelled)) == identity(Trial(**RECONSTRUCT))


@given(st.floats(1e-12, 1e3), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_spelling_of_numbers_does_not_matter(value, zeros):
    whole, _, fraction = format(Decimal(value), "f").partition(".")
    spellings = [
        repr(value),
        f"{value:.17e}",
        f"{value:.17E}",
        f"{value:.20e}",
        f"{whole}.{fraction}" + "0" * zeros,
    ]
    text = "name: a\nmodel: {path: m}\ncalibration: {dataset: builtin:x}\nsweep:\n- {recovery: reconstruct, "
    text += "criterion: wanda, sparsity: 0.6, granularity: block, learning_rate: %s}\n"
    made = [SearchSpace.from_text(text % spelling).expand()[1].trial for spelling in spellings]
    assert {identity(trial) for trial in made} == {identity(Trial(**{**RECONSTRUCT, "learning_rate": value}))}


def test_signs_of_zero_and_whole_numbers():
    zero = {**MASK, "sparsity": 0.0}
    assert identity(Trial(**zero)) == identity(Trial(**{**zero, "sparsity": -0.0}))
    assert identity(Trial(**zero)) == identity(Trial(**{**zero, "sparsity": 0}))


def test_the_dense_model_has_one_identity_for_all_calibration_sets():
    assert identity(Trial.dense(), calibration="c") == identity(Trial.dense(), calibration=None)
    assert identity(Trial.dense()) != identity(Trial.dense(), model="n")


@pytest.mark.parametrize(
    "missing", [{"model": ""}, {"model": None}, {"calibration": None}, {"dtype": "auto"}]
)
def test_what_has_no_content_hash_is_refused(missing):
    with pytest.raises(RaysweepError):
        identity(Trial(**MASK), **missing)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, {1}, object(), Path("x"), b"x", {1: 2}, {"a": [{"b": -math.inf}]}, Trial.dense()],
)
def test_what_has_no_canonical_text_is_refused(value):
    with pytest.raises(RaysweepError, match="identity"):
        canonical_json(value)


def test_the_refusal_names_the_place():
    with pytest.raises(RaysweepError, match=r"value\.a\[1\]\.b"):
        fingerprint({"a": [1, {"b": math.nan}]})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
@settings(max_examples=100, deadline=None)
def test_canonical_text_is_json_of_the_value(value):
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text
    assert is_identity(fingerprint(value))


@given(JSON, JSON)
@settings(max_examples=100, deadline=None)
def test_different_values_have_different_texts(left, right):
    if json.dumps(left, sort_keys=True) != json.dumps(right, sort_keys=True):
        assert (
            canonical_json({"x": left, "z": 0.5}) != canonical_json({"x": right, "z": 0.5}) or left == right
        )


def test_measuring_changes_the_row_and_not_the_weights():
    protocol = {"perplexity": [{"name": "x", "sequence_length": 64}]}
    base = trial_id("0" * 16, protocol, {"x": "h"})
    assert base == trial_id("0" * 16, dict(protocol), {"x": "h"})
    others = [
        trial_id("1" * 16, protocol, {"x": "h"}),
        trial_id("0" * 16, {"perplexity": [{"name": "x", "sequence_length": 65}]}, {"x": "h"}),
        trial_id("0" * 16, protocol, {"x": "other"}),
        trial_id("0" * 16, protocol, {"x": "h", "validation": "v"}),
    ]
    assert len({base, *others}) == 5
    with pytest.raises(RaysweepError, match="'x'"):
        trial_id("0" * 16, protocol, {"x": ""})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0123456789abcdef", True),
        ("0123456789ABCDEF", False),
        ("0123", False),
        (None, False),
        ("g" * 16, False),
        ("0123456789abcdef\n", False),
    ],
)
def test_is_identity(text, expected):
    assert is_identity(text) is expected
