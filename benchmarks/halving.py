"""Whether successive halving finds the learning rate of the whole ladder's best, and what it costs beside the ladder.

    python benchmarks/halving.py             fourteen learning rates, three seeds, on the embedded model
    python benchmarks/halving.py --quick     six of them, one seed, on a few samples, to try the script

Prints one JSON line per seed and one for all. Both sweeps run through Ray and Tune in one run; device seconds are
compared, which are core-seconds of the shards and no time on the clock.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from raysweep.config.space import SearchSpace
from raysweep.launching.launch import launch

LADDER = [round(1.0e-5 * 2.0**step, 10) for step in range(14)]  # 1e-5 to 8e-2
METRIC = "validation_perplexity"


def space(scheduler: str, quick: bool) -> SearchSpace:
    """One cell for every seed: Wanda 60 %, subblock by subblock, over a ladder of learning rates."""
    return SearchSpace.from_dict(
        {
            "name": scheduler,
            "model": {"path": "builtin:pystdlib", "dtype": "float32"},
            "calibration": {
                "dataset": "builtin:pystdlib",
                "num_samples": 8 if quick else 48,
                "sequence_length": 128,
                "seed": [0] if quick else [0, 1, 2],
            },
            "validation": {"samples": 8},
            "evaluation": {
                "perplexity": [
                    {
                        "name": "pystdlib",
                        "dataset": "builtin:pystdlib",
                        "sequence_length": 128,
                        "max_windows": 8 if quick else 32,
                    }
                ]
            },
            "search": {"scheduler": scheduler},
            "sweep": [
                {
                    "recovery": "reconstruct",
                    "criterion": "wanda",
                    "sparsity": 0.6,
                    "granularity": "subblock",
                    "learning_rate": LADDER[::3] if quick else LADDER,
                }
            ],
        }
    )


def recovered(scheduler: str, quick: bool) -> pd.DataFrame:
    with tempfile.TemporaryDirectory() as storage:
        rows = launch(space(scheduler, quick), storage=Path(storage), address="local")
    rows = rows[rows.recovery == "reconstruct"]
    assert not (rows.status == "failed").all(), rows.error.dropna().tolist()
    return rows


def best(rows: pd.DataFrame) -> pd.Series[Any]:
    return rows[rows.status == "finished"].sort_values(METRIC).iloc[0]


def report(figure: str, **values: Any) -> None:
    print(json.dumps({"figure": figure} | values), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples, to try the script")
    options = parser.parse_args()
    whole, halved = recovered("none", options.quick), recovered("asha", options.quick)
    spread = whole.groupby("learning_rate")[METRIC].std().median()
    for seed, ladder in whole.groupby("calibration_seed"):
        mine = halved[halved.calibration_seed == seed]
        report(
            f"seed {seed}",
            best_of_ladder=float(best(ladder).learning_rate),
            best_of_halving=float(best(mine).learning_rate),
            perplexity_of_ladder=round(float(best(ladder)[METRIC]), 4),
            perplexity_of_halving=round(float(best(mine)[METRIC]), 4),
            finished=int((mine.status == "finished").sum()),
            share_of_device_seconds=round(float(mine.device_seconds.sum() / ladder.device_seconds.sum()), 3),
        )
    report(
        "halving over the ladder, device seconds",
        value=round(float(halved.device_seconds.sum() / whole.device_seconds.sum()), 3),
        trials=len(whole),
        standard_deviation_over_seeds=None if pd.isna(spread) else round(float(spread), 4),
    )


if __name__ == "__main__":
    main()
