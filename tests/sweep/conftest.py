"""A small space on the tiny model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysweep.config.space import SearchSpace


@pytest.fixture
def space_dict(tiny_llama: Path, tiny_text: Path) -> dict[str, Any]:
    """Two criteria, pruned only and reconstructed at every granularity: eight trials and the dense model."""
    return {
        "name": "tiny",
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "calibration": {"dataset": str(tiny_text), "num_samples": 6, "sequence_length": 32},
        "validation": {"samples": 3},
        "evaluation": {
            "perplexity": [
                {"name": "test", "dataset": str(tiny_text), "sequence_length": 32, "max_windows": 5},
                {"name": "short", "dataset": str(tiny_text), "sequence_length": 16, "max_windows": 3},
            ]
        },
        "sweep": [
            {"recovery": "none", "criterion": ["magnitude", "wanda"], "sparsity": 0.5},
            {
                "recovery": "reconstruct",
                "criterion": ["magnitude", "wanda"],
                "sparsity": 0.5,
                "granularity": ["matrix", "subblock", "block"],
                "learning_rate": 0.01,
            },
        ],
    }


@pytest.fixture
def make_space(space_dict: dict[str, Any]) -> Callable[..., SearchSpace]:
    """The small space with some sections changed: `make_space(calibration={"seed": [0, 1]})`."""

    def make(**changes: Any) -> SearchSpace:
        data = copy.deepcopy(space_dict)
        for section, change in changes.items():
            if isinstance(change, dict):
                data.setdefault(section, {}).update(change)
            else:
                data[section] = change
        return SearchSpace.from_dict(data)

    return make
