"""What to do: for each model and sparsity the cheapest setting that is as good as the best one, and a space that runs
it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from raysweep.analysis.paired import Margin
from raysweep.analysis.pareto import setting_means
from raysweep.analysis.settings import METRIC, TUNED
from raysweep.config.dialect import dump_yaml
from raysweep.config.field_groups import MASK_FIELDS
from raysweep.config.space import SearchSpace
from raysweep.config.trial import Trial

COST = "device_seconds_standalone"


def recommended(rows: pd.DataFrame, margin: Margin, metric: str = METRIC, mode: str = "min") -> pd.DataFrame:
    """By stratum the setting to use: of those whose mean of `metric` lies within the margin of the best one, the one
    that takes the least device time by itself.

    rows: of `ladder.tuned`
    Columns: those of `setting_means`, best (the label of the best setting), behind (how far its metric lies behind that
    one's), learning_rate, and trial_id of the setting's best trial
    """
    means, sign = setting_means(rows), 1.0 if mode == "min" else -1.0
    chosen = []
    for _, mine in means[means[metric].notna()].groupby("stratum", sort=False):
        by_quality = mine.assign(behind=sign * mine[metric]).sort_values("behind", kind="stable")
        best = by_quality.iloc[0]
        by_quality["behind"] -= best["behind"]
        near = by_quality[by_quality["behind"] <= margin.at(best[metric])]
        cheapest = near.sort_values(COST, kind="stable").iloc[0].to_dict()
        trials = rows[rows["setting"] == cheapest["setting"]]
        trial = trials.assign(order=sign * trials[metric]).sort_values("order", kind="stable").iloc[0]
        found = {"best": best["label"], TUNED: trial[TUNED], "trial_id": trial["trial_id"]}
        chosen.append(cheapest | found)
    return pd.DataFrame(chosen, columns=[*means.columns, "behind", "best", TUNED, "trial_id"])


def recipe_yaml(space: SearchSpace, row: Mapping[str, Any]) -> str:
    """A search space with one trial of a sweep alone, beside its pruned and its dense model.

    space: of the sweep;  row: of the trial, as `records` gives it
    """
    trial = Trial.from_columns(dict(row)).identity()
    if isinstance(trial.get("sparsity"), tuple):
        trial["sparsity"] = dict(trial["sparsity"])
    whole = space.to_dict()
    calibration = {
        name: row.get(f"calibration_{name}", value) for name, value in whole["calibration"].items()
    }
    model = {name: value for name, value in whole["model"].items() if not isinstance(value, list)}
    document = {
        "name": f"{whole['name']}-recipe",
        "model": model | {"path": row["model"]},
        "calibration": {name: value for name, value in calibration.items() if value is not None},
        "validation": whole["validation"],
        "evaluation": whole["evaluation"],
        "sweep": [*_pruned_only(trial), trial],
    }
    return dump_yaml(SearchSpace.from_dict(document).to_dict() | {"sweep": document["sweep"]})


def _pruned_only(trial: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model before recovery, where there is such a one: masks behind recovered units come with their recovery."""
    if trial["recovery"] == "none" or trial.get("statistics_stream") == "recovered":
        return []
    return [{"recovery": "none"} | {name: trial[name] for name in MASK_FIELDS if name in trial}]
