"""What to do: for each model and sparsity the cheapest setting that is as good as the best one, and a space that runs
it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from raysweep.analysis.paired import Margin, difference
from raysweep.analysis.pareto import setting_means
from raysweep.analysis.settings import CHOICE, METRIC, TUNED
from raysweep.config.dialect import dump_yaml
from raysweep.config.field_groups import MASK_FIELDS
from raysweep.config.space import SearchSpace
from raysweep.config.trial import Trial

COST = "device_seconds_standalone"
MAPPINGS = ("sparsity", "start_from")  # fields that a trial may hold as pairs
LEAST_SEEDS = 3  # in common with the best setting, from which on another one can be said to be as good


def recommended(rows: pd.DataFrame, margin: Margin, metric: str = METRIC) -> pd.DataFrame:
    """By stratum the setting to use: of those that are as good as the best one by `metric`, the one that takes the
    least device time by itself.

    As good is what lies behind the best one by less than the margin with the whole 95 % interval of the paired
    difference over seeds; with fewer than `LEAST_SEEDS` nothing can be said to be that, and the best one is
    recommended.

    rows: of `ladder.tuned`;  metric: that they were chosen by. Where it is no perplexity, the margin's relative part
    alone
    Columns: those of `setting_means`, is_best, best (the label of the best setting), behind (how far its metric lies
    behind that one's), learning_rate, and trial_id of the setting's best trial
    """
    means = setting_means(rows)
    choices = rows[["setting", "repeat", CHOICE]]
    if not metric.endswith("perplexity"):
        margin = Margin(0.0, margin.relative)
    chosen = []
    for _, mine in means[means[CHOICE].notna()].groupby("stratum", sort=False):
        best = mine.sort_values(CHOICE, kind="stable").iloc[0]
        good = [_is_as_good(choices, setting, best["setting"], margin) for setting in mine["setting"]]
        cheapest = mine[good].sort_values(COST, kind="stable").iloc[0].to_dict()
        trials = rows[rows["setting"] == cheapest["setting"]]
        trial = trials.sort_values(CHOICE, kind="stable").iloc[0]
        found = {"is_best": cheapest["setting"] == best["setting"], "best": best["label"]}
        found |= {
            "behind": cheapest[CHOICE] - best[CHOICE],
            TUNED: trial[TUNED],
            "trial_id": trial["trial_id"],
        }
        chosen.append(cheapest | found)
    return pd.DataFrame(chosen, columns=[*means.columns, "is_best", "best", "behind", TUNED, "trial_id"])


def _is_as_good(rows: pd.DataFrame, setting: str, best: str, margin: Margin) -> bool:
    if setting == best:
        return True
    mine, other = (rows[rows["setting"] == one].groupby("repeat")[CHOICE].mean() for one in (setting, best))
    both = pd.concat([mine, other], axis=1, keys=["mine", "best"]).dropna()
    if len(both) < LEAST_SEEDS:
        return False
    found = difference(list(both["mine"]), list(both["best"]), margin)
    return bool(found["high"] <= found["margin"])


def recipe_yaml(space: SearchSpace, row: Mapping[str, Any]) -> str:
    """A search space with one trial of a sweep alone, beside its pruned and its dense model.

    space: of the sweep;  row: of the trial, as `records` gives it
    """
    trial = Trial.from_columns(dict(row)).identity()
    trial |= {name: dict(trial[name]) for name in MAPPINGS if isinstance(trial.get(name), tuple)}
    whole = space.to_dict()
    calibration = {
        name: row.get(f"calibration_{name}", value) for name, value in whole["calibration"].items()
    }
    model = whole["model"] | {"path": row["model"]}  # of several revisions all: rows do not name them
    if isinstance(model["dtype"], list):
        model["dtype"] = row["dtype"]
    document = {
        "name": f"{whole['name']}-recipe",
        "model": model,
        "calibration": {name: value for name, value in calibration.items() if value is not None},
        "validation": whole["validation"],
        "evaluation": whole["evaluation"],
        "sweep": [*_pruned_only(trial), trial],
        "search": {
            "metric": space.search.metric,
            "mode": space.search.mode,
        },  # without validation not the default
    }
    return dump_yaml(SearchSpace.from_dict(document).to_dict() | {"sweep": document["sweep"]})


def _pruned_only(trial: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model before recovery, where there is such a one: masks behind recovered units come with their recovery."""
    if trial["recovery"] == "none" or trial.get("statistics_stream") == "recovered":
        return []
    return [{"recovery": "none"} | {name: trial[name] for name in MASK_FIELDS if name in trial}]
