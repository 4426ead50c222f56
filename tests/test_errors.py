"""Errors keep all they say when they travel between processes."""

import multiprocessing
import pickle

import pytest

from raysweep.errors import (
    CapacityError,
    NumericalError,
    RaysweepError,
    ShardLostError,
    UsageError,
    first_line,
    nearest_name,
)

FIELDS = {"where": "a.yaml:3: sweep[0].x", "allowed": "y | z", "nearest": "y", "remedy": "write y"}


@pytest.mark.parametrize("kind", [RaysweepError, NumericalError, ShardLostError])
def test_plain_errors_survive_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("loss is nan in unit 3.mlp")))
    assert type(error) is kind
    assert str(error) == error.message == "loss is nan in unit 3.mlp"
    assert error.exit_status == 1


@pytest.mark.parametrize("kind", [UsageError, CapacityError])
def test_usage_errors_keep_every_field(kind):
    original = kind("unknown key 'x'", **FIELDS)
    error = pickle.loads(pickle.dumps(original))
    assert type(error) is kind
    assert {name: getattr(error, name) for name in FIELDS} == FIELDS
    assert (error.what, str(error), error.exit_status) == (original.what, str(original), 2)


def _fail(_):
    raise UsageError("unknown key 'x'", **FIELDS)


def test_a_usage_error_crosses_a_process():
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(UsageError) as caught:
        pool.map(_fail, [0])
    assert caught.value.remedy == "write y"


def test_the_text_says_everything():
    text = str(UsageError("unknown key 'x'", **FIELDS))
    assert text.startswith("a.yaml:3: sweep[0].x: unknown key 'x'")
    for part in ("did you mean 'y'?", "allowed: y | z", "write y"):
        assert part in text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("  gone\nfor good"), "gone"),
        (KeyError(), "KeyError"),
        (ValueError("\n \n"), "ValueError"),
        (ValueError("x" * 999), "x" * 300),
    ],
)
def test_the_first_line_of_a_foreign_error_is_short_and_never_empty(error, line):
    assert first_line(error) == line


def test_nearest_name_is_close_or_absent():
    known = ["sparsity", "pattern", "learning_rate"]
    assert nearest_name("sparcity", known) == "sparsity"
    assert nearest_name("learningrate", known) == "learning_rate"
    assert nearest_name("quux", known) is None
    assert nearest_name("log_uniform", ["uniform", "loguniform"]) == "loguniform"
