"""Runs commands in this process, in an empty folder, as a script would: no terminal, two separate outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raysweep.cli.main import app


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit status and its two outputs."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def here(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one; no setting of the environment speaks into the tests. What this machine
    keeps for later lies elsewhere, so that tests see of `tmp_path` what else is written."""
    for name in ("RAYSWEEP_STORAGE", "RAYSWEEP_DEBUG", "COLUMNS", "RAY_ADDRESS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path_factory.mktemp("cache")))
    return folder


@pytest.fixture
def raysweep(here: Path) -> Callable[..., Ran]:
    """raysweep("results", "NAME"): runs the command."""

    def run(*arguments: object) -> Ran:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def small_space(tiny_llama: Path, tiny_text: Path) -> dict[str, Any]:
    """Two pruned trials, one reconstructed, and the dense model, on the tiny model and text."""
    return {
        "name": "small",
        "model": {"path": str(tiny_llama)},
        "calibration": {"dataset": str(tiny_text / "train.parquet"), "num_samples": 4, "sequence_length": 32},
        "validation": {"samples": 2},
        "evaluation": {
            "perplexity": [
                {
                    "name": "tiny",
                    "dataset": str(tiny_text / "test.parquet"),
                    "split": "train",
                    "sequence_length": 32,
                    "max_windows": 4,
                }
            ]
        },
        "sweep": [
            {"recovery": "none", "criterion": ["magnitude", "wanda"], "sparsity": 0.5},
            {
                "recovery": "reconstruct",
                "criterion": "wanda",
                "sparsity": 0.5,
                "granularity": "subblock",
                "learning_rate": 0.01,
            },
        ],
    }


@pytest.fixture
def space_file(small_space: dict[str, Any], tmp_path: Path) -> Path:
    """The small space as a file (JSON is YAML)."""
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(small_space, indent=1))
    return path
