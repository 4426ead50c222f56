"""A sweep over a mixture of experts: rows, fallbacks that are counted, and what is refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysweep.config.space import SearchSpace
from raysweep.errors import UsageError
from raysweep.launching.launch import launch
from raysweep.results.reader import load_units
from tests.frames import assert_same_numbers
from tests.zoo import make_zoo_model


@pytest.fixture
def mixture(tiny_tokenizer, tmp_path) -> Path:
    """A folder with a Mixtral of twelve experts, which get sixteen tokens of each hundred, and a tokenizer."""
    folder = tmp_path / "mixture"
    model = make_zoo_model("mixtral", vocab_size=len(tiny_tokenizer), num_local_experts=12)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def space_of(make_space, mixture: Path, **changes: object) -> SearchSpace:
    sweep = [
        {"recovery": "none", "criterion": "wanda", "sparsity": 0.5},
        {
            "recovery": "reconstruct",
            "criterion": "wanda",
            "sparsity": 0.5,
            "granularity": ["subblock", "model"],
            "learning_rate": 0.003,
        },
    ]
    return make_space(model={"path": str(mixture)}, sweep=sweep, **changes)


def test_rows_count_experts_that_fell_back_and_no_number_of_shards_changes_them(
    make_space, mixture, tmp_path
):
    space = space_of(make_space, mixture)
    rows = launch(space, storage=tmp_path, in_process=True)
    assert list(rows.status.unique()) == ["finished"]
    units = load_units(tmp_path / "tiny")
    linears = units[units.kind == "linear"]
    assert linears.groupby("trial_id").size().eq(2 * (4 + 12 * 2)).all()
    fell_back = linears[linears.fallback.notna()]
    assert fell_back.unit.str.contains("experts").all()
    assert 0 < len(fell_back) < len(linears)
    counted = rows[rows.recovery != "dense"].set_index("trial_id").fallbacks
    assert counted.to_dict() == fell_back.groupby("trial_id").size().to_dict()
    recovered = units[units.kind == "unit"]
    assert (recovered.loss_after < recovered.loss_before).all()
    other = space_of(make_space, mixture, execution={"shards": 2})
    launch(other, storage=tmp_path / "other", in_process=True)
    assert_same_numbers(tmp_path / "tiny", tmp_path / "other" / "tiny")


def test_matrices_of_experts_are_refused_before_anything_is_written(make_space, mixture, tmp_path):
    sweep = [
        {
            "recovery": "reconstruct",
            "criterion": "wanda",
            "sparsity": 0.5,
            "granularity": "matrix",
            "learning_rate": 0.01,
        }
    ]
    space = make_space(model={"path": str(mixture)}, sweep=sweep)
    with pytest.raises(UsageError, match=r"experts\.0\.\w+ is of an expert"):
        launch(space, storage=tmp_path, in_process=True)
    assert not (tmp_path / "tiny").exists()
