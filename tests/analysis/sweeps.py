"""Sweeps as they come out, made up: what a space asks for, with numbers that behave like those of real trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.config.expansion import PlannedTrial
from raysweep.config.space import SearchSpace
from raysweep.results.folders import SPACE_FILE
from raysweep.results.schema import planned_columns
from raysweep.results.writer import write_rows
from tests.analysis.rows import START

BLOCKS = 6
DENSE = 9.15
LOST = {"random": 60.0, "magnitude": 6.1, "wanda": 4.6, "ria": 4.2, "sparsegpt": 2.6}
LEFT = {"matrix": 0.62, "subblock": 0.35, "block": 0.352, "window:2": 0.34, "model": 0.45}
BEST = {"matrix": 3e-3, "subblock": 1e-3, "block": 1e-3, "window:2": 3e-4, "model": 1e-4, "retrain": 1e-4}
SECONDS = {"matrix": 6.0, "subblock": 8.0, "block": 9.0, "window:2": 15.0, "model": 40.0, "retrain": 95.0}
MIB = {"matrix": 5.9, "subblock": 13.1, "block": 18.4, "window:2": 34.0, "model": 110.0, "retrain": 240.0}
DIVERGES = 0.03  # learning rate from which a made-up trial fails


def space(**changes: Any) -> SearchSpace:
    """Two sparsities, three criteria, three seeds, a ladder of learning rates, retraining; `changes` are sections."""
    masks: dict[str, Any] = {"criterion": ["magnitude", "wanda", "sparsegpt"], "sparsity": [0.5, 0.6]}
    rates = [1e-4, 3e-4, 1e-3, 3e-3]
    document = {
        "name": "made-up",
        "model": {"path": "builtin:pystdlib", "dtype": "float32"},
        "calibration": {
            "dataset": "builtin:pystdlib",
            "num_samples": 48,
            "sequence_length": 128,
            "seed": [0, 1, 2],
        },
        "evaluation": {
            "perplexity": [
                {"name": "pystdlib", "dataset": "builtin:pystdlib", "sequence_length": 128, "max_windows": 32}
            ]
        },
        "sweep": [
            {"recovery": "none", **masks},
            {
                "recovery": "reconstruct",
                **masks,
                "granularity": ["matrix", "subblock", "block", "window:2"],
                "learning_rate": rates,
            },
            {"recovery": "reconstruct", **masks, "granularity": "matrix", "optimizer": "exact"},
            {"recovery": "retrain", **masks, "learning_rate": rates},
        ],
    }
    return SearchSpace.from_dict(document | changes)


def rows_of(made: SearchSpace, chance: int = 0) -> list[dict[str, Any]]:
    """The rows of all trials of a space, in its order."""
    rng = np.random.default_rng(chance)
    draws = {seed: rng.normal(0, 0.12) for seed in range(100)}
    return [_row(number, one, rng, draws) for number, one in enumerate(made.expand())]


def units_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The output error of every block, which grows with depth."""
    if row["status"] != "finished" or row["recovery"] == "dense":
        return []
    return [
        {
            "kind": "block",
            "unit": str(block),
            "block": block,
            "error_after": row["output_error_calibration"] * ((block + 1) / BLOCKS) ** 0.8,
        }
        for block in range(BLOCKS)
    ]


def write(
    folder: Path, made: SearchSpace, keep: Callable[[dict[str, Any]], bool] = bool, chance: int = 0
) -> Path:
    """A sweep in `folder` with the rows that are to be kept, all of them unless said otherwise; returns it."""
    return write_these(folder, made, filter(keep, rows_of(made, chance)))


def write_these(folder: Path, made: SearchSpace, rows: Iterable[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SPACE_FILE).write_text(made.resolved_yaml(), encoding="utf-8")
    for row in rows:
        write_rows(folder, row, units_of(row), made.evaluation.names)
    return folder


def _row(
    number: int, planned: PlannedTrial, rng: np.random.Generator, draws: dict[int, float]
) -> dict[str, Any]:
    columns = planned_columns(planned)
    started = START + timedelta(seconds=20 * number)
    row = columns | {
        "trial_id": f"{number:016x}",
        "recovery_id": f"{number:016x}",
        "sweep": "made-up",
        "status": "finished",
        "dtype": "float32",
        "model_hash": "5d2f5b0a2c9e41d7",
        "evaluation_protocol": '{"perplexity": [{"name": "pystdlib", "sequence_length": 128, "max_windows": 32}], '
        '"validation": {"samples": 16, "seed": 0, "sequence_length": 128}}',
        "calibration_hash": f"{number % 3:016x}",
        "raysweep_version": "0.1.0",
        "torch_version": "2.11.0",
        "transformers_version": "5.1.0",
        "device_name": "a processor",
        "shards": 2,
        "devices": 2,
        "started_at": started,
        "finished_at": started + timedelta(seconds=18),
    }
    if (planned.trial.learning_rate or 0.0) >= DIVERGES:
        return row | {
            "status": "failed",
            "error": "perplexity is inf: not a result",
            "error_kind": "numerical",
        }
    return row | _measured(planned, rng, draws)


def _measured(planned: PlannedTrial, rng: np.random.Generator, draws: dict[int, float]) -> dict[str, Any]:
    trial = planned.trial
    if trial.is_dense:
        return {
            "perplexity": DENSE,
            "validation_perplexity": DENSE - 2.07,
            "output_error_calibration": 0.0,
        } | {
            "device_seconds": 1.6,
            "device_seconds_standalone": 1.6,
        }
    assert planned.calibration is not None
    sparsity = trial.sparsity if isinstance(trial.sparsity, float) else 0.5
    pruned = LOST[str(trial.criterion)] * math.exp(7 * (sparsity - 0.6))
    how = "retrain" if trial.recovery == "retrain" else str(trial.granularity)
    worth, seconds, size = pruned, 1.2, None
    if trial.recovery != "none":
        worth = pruned**0.25 * LEFT.get(how, 0.45) * 4.2 * math.exp(4 * (sparsity - 0.6))
        size, seconds = int(MIB[how] * 2**20), SECONDS[how]
        if trial.learning_rate:
            worth *= 1 + 0.25 * math.log10(trial.learning_rate / BEST[how]) ** 2
        else:
            worth, seconds, size = worth * 0.93, 2.2, int(3.1 * 2**20)
    perplexity = DENSE + worth + worth * 0.1 * draws[planned.calibration.seed] + rng.normal(0, 0.015)
    own = seconds * float(rng.uniform(0.94, 1.06))
    return {
        "perplexity": perplexity,
        "perplexity_pystdlib": perplexity,
        "validation_perplexity": perplexity - 2.0 + rng.normal(0, 0.01),
        "dense_perplexity": DENSE,
        "pruned_perplexity": DENSE + pruned,
        "realized_sparsity": sparsity,
        "output_error_calibration": 0.02 * worth,
        "seconds_total": own,
        "device_seconds": own + 1.4,
        "device_seconds_standalone": own + 4.2,
        "peak_recovery_bytes": size,
        "tokens_unique": None if trial.recovery == "none" else 48 * 128,
        "training_flops": None if trial.recovery == "none" else 1e10 * seconds,
    }
