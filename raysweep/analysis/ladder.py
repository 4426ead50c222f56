"""Learning rates: the best of each setting, and whether it lies inside the ladder that was tried."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from raysweep.analysis.settings import METRIC, TUNED, finished
from raysweep.results.schema import NUMERICAL

INSIDE, LOWEST, HIGHEST, ONLY = "inside", "lowest", "highest", "only one"


def learning_rate_curves(frame: pd.DataFrame, metric: str = METRIC, mode: str = "min") -> pd.DataFrame:
    """Of every setting that is trained in steps the mean of `metric` at each learning rate.

    frame: of `with_settings`;  mode: min or max
    Columns: setting, learning_rate, mean, seeds (how many the mean is over), diverged (trials that failed numerically).
    Learning rates are compared on the seeds on which all of a setting were tried, where there are such; one that
    diverged is worse than all others.
    """
    trained = frame[frame[TUNED].notna() & frame["recovery"].isin(("reconstruct", "retrain"))]
    usable = trained[(trained["status"] == "finished") & trained[metric].notna()]
    diverged = trained[(trained["status"] == "failed") & (trained["error_kind"] == NUMERICAL)]
    worst = np.inf if mode == "min" else -np.inf
    values = pd.concat([usable.assign(value=usable[metric]), diverged.assign(value=worst)])
    points = ["setting", "repeat", TUNED]
    means = (
        values.groupby(points, sort=False)["value"].mean().reset_index()
    )  # over orders of steps on one set
    seeds = _of_all_rates(means)
    compared = means[seeds | ~seeds.groupby(means["setting"]).transform("any")]
    compared = compared.assign(infinite=np.isinf(compared["value"].astype(float)))
    table = (
        compared.groupby(["setting", TUNED], sort=False)
        .agg(mean=("value", "mean"), seeds=("value", "count"), diverged=("infinite", "sum"))
        .reset_index()
    )
    order = {setting: place for place, setting in enumerate(values["setting"].unique())}
    table = table.assign(order=table["setting"].map(order)).sort_values(["order", TUNED], ignore_index=True)
    return table[["setting", TUNED, "mean", "seeds", "diverged"]]


def _of_all_rates(values: pd.DataFrame) -> pd.Series:
    """By row whether all learning rates of its setting were tried on its seeds."""
    tried = values.groupby("setting")[TUNED].transform("nunique")
    there = values.groupby(["setting", "repeat"])[TUNED].transform("size")
    return there == tried


def best_learning_rates(frame: pd.DataFrame, metric: str = METRIC, mode: str = "min") -> pd.DataFrame:
    """The learning rate of each setting with the best mean of `metric`; of equal ones the smallest.

    Columns: setting, learning_rate, mean, seeds, tried (how many), place: `inside` the ladder, its `lowest` or
    `highest`, where a better one may lie beyond, or the `only one`.
    """
    curves = learning_rate_curves(frame, metric, mode)
    found = [
        {"setting": setting} | _best(curve.sort_values(TUNED), mode)
        for setting, curve in curves.groupby("setting", sort=False)
    ]
    return pd.DataFrame(
        [one for one in found if np.isfinite(one["mean"])],
        columns=["setting", TUNED, "mean", "seeds", "tried", "place"],
    )


def _best(curve: pd.DataFrame, mode: str) -> dict[str, Any]:
    means = curve["mean"].to_numpy()
    place = int(np.argmin(means) if mode == "min" else np.argmax(means))
    return {
        TUNED: float(curve[TUNED].iloc[place]),
        "mean": float(means[place]),
        "seeds": int(curve["seeds"].iloc[place]),
        "tried": len(curve),
        "place": _place(place, len(curve)),
    }


def _place(place: int, tried: int) -> str:
    if tried == 1:
        return ONLY
    return LOWEST if place == 0 else HIGHEST if place == tried - 1 else INSIDE


def tuned(frame: pd.DataFrame, metric: str = METRIC, mode: str = "min") -> pd.DataFrame:
    """The finished rows of pruned models that comparisons are made of: of each setting that is trained in steps those
    at its best learning rate."""
    best = best_learning_rates(frame, metric, mode)
    chosen = set(zip(best["setting"], best[TUNED], strict=True))
    rows = finished(frame)
    keep = [
        pd.isna(rate) or (setting, rate) in chosen
        for setting, rate in zip(rows["setting"], rows[TUNED], strict=True)
    ]
    return rows[np.array(keep, dtype=bool)]  # an empty list would choose no columns


def edges(best: pd.DataFrame) -> Iterable[dict[str, Any]]:
    """The settings whose best learning rate is the lowest or highest that was tried."""
    return best[best["place"].isin((LOWEST, HIGHEST))].to_dict("records")  # type: ignore[return-value]
