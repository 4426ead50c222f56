"""Rows by an expression: as pandas understands it where both do, and nothing else than comparing."""

from __future__ import annotations

import pytest

from raysweep.analysis.where import MOST_NAMED, rows_where, texts_of_no_row
from raysweep.errors import UsageError
from tests.analysis.rows import frame, quickstart_rows, row


@pytest.fixture
def rows(tmp_path):
    odd = row(50, sparsity=0.5, criterion="ria", epochs=3, perplexity=30.0) | {"perplexity_c4-en": 31.0}
    return frame(tmp_path / "a", [*quickstart_rows(), odd])


@pytest.mark.parametrize(
    "expression",
    [
        "sparsity == 0.6 and criterion == 'wanda'",
        "sparsity == 0.6 & criterion == 'wanda' | recovery == 'dense'",
        "perplexity < 14 or epochs > 2",
        "12 < perplexity <= 16",
        "criterion in ['ria', 'wanda'] and not recovery == 'none'",
        "perplexity - 2 * validation_perplexity > -1.5",
        "`perplexity_c4-en` > 30",
        "(epochs == 3)",
        'criterion == "magnitude"',
        "-perplexity < -19",
    ],
)
def test_it_chooses_what_pandas_does(rows, expression):
    chosen = rows_where(rows, expression)
    assert 0 < len(chosen) < len(rows)
    assert chosen.equals(rows[rows.eval(expression, engine="python").fillna(False).astype(bool)])


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("criterion == 'wanda/row'", ["no trial has criterion 'wanda/row'; there are wanda, magnitude, ria"]),
        ("'wnada' == criterion", ["no trial has criterion 'wnada'; there are wanda, magnitude, ria"]),
        ("criterion in ['ria', 'x'] and `pattern` == '2:4'", ["criterion 'x'", "pattern '2:4'"]),
        ("criterion == 'wanda' and granularity == 'block'", []),
        ("not criterion == 'x' and criterion != 'y' and criterion > 'z'", []),
        ("sparsity == 0.9 and criterion == null and 'a' == 'b'", []),
    ],
)
def test_texts_that_no_trial_has_are_told(rows, expression, told):
    found = texts_of_no_row(rows, expression)
    assert len(found) == len(told)
    assert all(words in each for words, each in zip(told, found, strict=True))


def test_what_is_told_stays_short(tmp_path):
    made = [row(number, error="e" * 5000 + f"{number}") for number in range(MOST_NAMED + 1)]
    rows = frame(tmp_path / "a", made)
    assert texts_of_no_row(rows, "error == 'x'") == ["no trial has error 'x'"]
    (told,) = texts_of_no_row(rows, "trial_id == 'x'")
    assert told.endswith(f"{MOST_NAMED - 1:016x}, ...")


@pytest.mark.parametrize(
    ("expression", "number"),
    [
        ("granularity == null", 3),
        ("granularity != null", 7),
        ("granularity != 'block'", 5),  # null is not something else
        ("granularity not in ['block']", 5),
        ("shuffle", 7),
        ("shuffle == true", 7),
        ("~(shuffle == true)", 3),
        ("1 > 2", 0),
        ("True", 10),
        ("epochs == 1000000000000000000000000", 0),
    ],
)
def test_what_does_not_apply_is_null(rows, expression, number):
    assert len(rows_where(rows, expression)) == number


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('touch harm')",
        "criterion.str.len() > 3",
        "criterion.__class__ == 1",
        "criterion[0] == 'w'",
        "@rows == 1",
        "[one for one in criterion] == 1",
        "lambda: 1",
        "f'{criterion}' == 'x'",
        "(a := 1) == 1",
        "sparsity ** 99 > 1",
        "'a' * 1000 == 'b'",
        "criterion if sparsity else loss",
        "perplexity",
        "criterion",
        "",
        "   ",
        "sparsity = 0.6",
        "sparsity < 'a'",
        "granularity < null",
        "1 in [1]",
        "1 / 0 > 1",
        "criterion is 'wanda'",
        "(" * 300 + "1" + ")" * 300,
        "not " * 100 + "shuffle",
        "-" * 900 + "1 > 0",
        "perplexity > 1 " * 300,
        "\x00",
        "'",
        "`a",
    ],
)
def test_all_else_is_refused(rows, expression, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        rows_where(rows, expression)
    assert refused.value.where == "--where"
    assert refused.value.allowed
    assert not (tmp_path / "harm").exists()


def test_an_unknown_column_is_refused_with_the_nearest_and_all_known(rows):
    with pytest.raises(UsageError) as refused:
        rows_where(rows, "sparcity == 0.6")
    assert refused.value.nearest == "sparsity"
    assert "perplexity_c4-en" in str(refused.value.allowed)
    with pytest.raises(UsageError, match="Texts stand in quotes"):
        rows_where(rows, "criterion == wanda")
