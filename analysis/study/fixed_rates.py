"""Makes the study from its ladder: every setting at the learning rate that was best for it, on other calibration seeds.

    python analysis/study/fixed_rates.py SWEEP OUTPUT.yaml [--seeds 5]

SWEEP: name or folder of the finished ladder. Beside the settings of the ladder the study has every mask pruned only,
and recovered exactly matrix by matrix, which needs no learning rate.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from raysweep.analysis.ladder import best_learning_rates, edges
from raysweep.analysis.rows import records
from raysweep.analysis.settings import setting_labels, with_settings
from raysweep.config.dialect import dump_yaml
from raysweep.config.space import SearchSpace
from raysweep.config.trial import Trial
from raysweep.results.folders import SPACE_FILE, sweep_folder
from raysweep.results.reader import load_results


def study(ladder: Path, seeds: int) -> dict[str, Any]:
    space, frame = SearchSpace.from_yaml(ladder / SPACE_FILE), with_settings(load_results(ladder))
    best = best_learning_rates(frame)
    labels = setting_labels(frame)
    for edge in edges(best):
        print(f"at the {edge['place']} of its ladder: {labels[edge['setting']]} {edge['learning_rate']:g}")
    settings = frame.drop_duplicates("setting").merge(
        best[["setting", "learning_rate"]], on="setting", suffixes=("_", "")
    )
    groups = [
        {name: value for name, value in Trial.from_columns(row).identity().items() if name != "seed"}
        for row in records(settings)
    ]
    masks = {name: sorted(frame[name].dropna().unique().tolist()) for name in ("criterion", "sparsity")}
    exact = {"recovery": "reconstruct", "granularity": "matrix", "optimizer": "exact"}
    document = space.to_dict()
    document["name"] = "study"
    document["calibration"] |= {"seed": list(range(seeds))}
    document["sweep"] = [{"recovery": "none"} | masks, exact | masks, *groups]
    del document["execution"], document["search"]
    SearchSpace.from_dict(document)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    made = study(sweep_folder(options.sweep), options.seeds)
    options.output.write_text(dump_yaml(made), encoding="utf-8")
    print(f"{len(SearchSpace.from_dict(made).expand())} trials in {options.output}")


if __name__ == "__main__":
    main()
