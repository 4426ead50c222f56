"""Sweeps whose weights, activations and statistics wait on disk, or are made anew: the numbers of any other sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raysweep.launching.launch import launch
from tests.frames import assert_same_numbers

RECONSTRUCT = {"recovery": "reconstruct", "criterion": "wanda", "sparsity": 0.5, "learning_rate": 0.01}
SWEEP = [
    {"recovery": "none", "criterion": ["wanda", "sparsegpt"], "sparsity": 0.5},
    {"recovery": "none", "criterion": "ria", "sparsity": 0.5, "statistics_stream": "pruned"},
    RECONSTRUCT | {"granularity": ["matrix", "subblock", "window:3", "model"]},
    RECONSTRUCT | {"granularity": "block", "statistics_stream": "recovered", "input_stream": "pruned"},
    RECONSTRUCT | {"granularity": "window:3", "input_stream": "pruned", "target_stream": "pruned"},
    RECONSTRUCT | {"granularity": "matrix", "optimizer": "exact", "learning_rate": None},
]


def _kept_tensors(folder: Path) -> dict[tuple[str, str, str], torch.Tensor]:
    """Masks and weights of kept trials, by trial, file and name."""
    files = (folder / "artifacts").glob("*/*.safetensors")
    return {
        (file.parent.name, file.name, name): tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize(
    "stores",
    [
        {"weight_store": "disk", "activation_store": "disk", "statistics_store": "disk", "boundaries": "all"},
        {"weight_store": "disk", "statistics_store": "anew", "boundaries": 3},
    ],
)
def test_a_sweep_through_small_memory_has_the_same_rows(make_space, tmp_path, stores):
    execution = {"shards": 2, "keep": "all"}
    rows = launch(make_space(sweep=SWEEP, execution=execution), storage=tmp_path / "memory", in_process=True)
    assert (rows.status == "finished").all()
    stores = stores | {"scratch": str(tmp_path / "scratch")}
    launch(make_space(sweep=SWEEP, execution=execution | stores), storage=tmp_path / "disk", in_process=True)
    assert_same_numbers(tmp_path / "disk" / "tiny", tmp_path / "memory" / "tiny")
    kept, expected = (_kept_tensors(tmp_path / place / "tiny") for place in ("disk", "memory"))
    assert kept.keys() == expected.keys()
    assert len({trial for trial, _, _ in kept}) == len(rows) - 1  # all but the dense model
    assert all(torch.equal(tensor, expected[key]) for key, tensor in kept.items())
    assert not any((tmp_path / "scratch").iterdir())  # files without names end with what lies in them
