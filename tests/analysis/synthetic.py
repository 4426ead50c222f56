"""Sweeps with planted effects: what their verdicts must be is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from raysweep.results.reader import load_results
from tests.analysis.rows import row, write_sweep

CRITERIA = ("magnitude", "wanda", "sparsegpt")
GRANULARITIES = ("matrix", "subblock", "block")

Quality = Callable[[Mapping[str, Any]], float]
"""The perplexity of a trial, by its fields; `seed` is that of its calibration set."""


def trials(
    quality: Quality,
    seeds: Sequence[int] = (0, 1, 2),
    sparsities: Sequence[float] = (0.5,),
    criteria: Sequence[str] = CRITERIA,
    granularities: Sequence[str] = GRANULARITIES,
    retraining: bool = False,
    **columns: Any,
) -> list[dict[str, Any]]:
    """Rows of a grid, each mask pruned only, reconstructed, and retrained where asked for; columns are those of all."""
    rows = [row(0, "dense", perplexity=5.0)]

    def add(recovery: str, **fields: Any) -> None:
        seed = fields.pop("calibration_seed")
        own = {} if recovery == "none" else {"seed": seed}
        value = quality(fields | {"recovery": recovery, "seed": seed})
        measured = {"perplexity": value, "validation_perplexity": value - 0.5, "tokens_unique": 4096}
        rows.append(row(len(rows), recovery, calibration_seed=seed, **own, **(measured | columns), **fields))

    for sparsity in sparsities:
        for criterion in criteria:
            for seed in seeds:
                mask = {"criterion": criterion, "sparsity": sparsity, "calibration_seed": seed}
                add("none", **mask)
                for granularity in granularities:
                    add("reconstruct", granularity=granularity, **mask)
                if retraining:
                    add("retrain", learning_rate=1e-4, **mask)
    return rows


def sweep_of(rows: list[dict[str, Any]], folder: Path) -> pd.DataFrame:
    """The rows as `load_results` gives them."""
    return load_results(write_sweep(folder / "a", rows))


def verdicts(comparisons: pd.DataFrame) -> dict[tuple[str, str], str]:
    """By question and value."""
    return {(one["question"], one["value"]): one["verdict"] for one in comparisons.to_dict("records")}
