"""Which settings no other one beats in quality without costing more."""

from __future__ import annotations

import numpy as np
import pandas as pd

from raysweep.analysis.ladder import tuned
from raysweep.analysis.questions import COSTS
from raysweep.analysis.settings import CHOICE, METRIC, QUALITY, finished, setting_labels, with_settings
from raysweep.config.sections import METRICS


def pareto_front(quality: pd.Series, cost: pd.Series) -> pd.Series:
    """For each row whether it is on the front: no other has both as low, and one of them lower. Less is better of both;
    equal rows are on it together, one with a NaN is not on it."""
    points = np.column_stack([quality.to_numpy(float), cost.to_numpy(float)])
    usable = ~np.isnan(points).any(axis=1)
    order = np.lexsort((points[:, 0], points[:, 1]))  # by cost, then by quality
    on_front = np.zeros(len(points), dtype=bool)
    best = np.inf  # quality of what costs less
    start = 0
    order = order[usable[order]]
    while start < len(order):
        alike = order[start:][points[order[start:], 1] == points[order[start], 1]]
        lowest = points[alike, 0].min()
        if lowest < best:
            on_front[alike[points[alike, 0] == lowest]] = True
            best = lowest
        start += len(alike)
    return pd.Series(on_front, index=quality.index)


def setting_means(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a setting: means over its seeds of quality and cost.

    rows: finished ones of `with_settings`, such as `ladder.tuned` chose. Columns: setting, label, stratum, method,
    mask, recovery, seeds, perplexity, spread (standard deviation of it over seeds), choice, and those of `METRICS` and
    `COSTS`
    """
    rows = finished(rows)
    means = rows.groupby("setting", sort=False).agg(
        stratum=("stratum", "first"),
        method=("method", "first"),
        mask=("mask", "first"),
        recovery=("recovery", "first"),
        seeds=("repeat", "nunique"),
        spread=(QUALITY, "std"),
        **{name: (name, "mean") for name in (QUALITY, CHOICE, *METRICS, *COSTS) if name in rows},
    )
    means.insert(0, "label", pd.Series(setting_labels(rows)))
    return means.reset_index()


def pareto(
    rows: pd.DataFrame, cost: str = "device_seconds_standalone", quality: str = QUALITY
) -> pd.DataFrame:
    """`setting_means` with a column `front`: whether a setting is on the front of its stratum in quality against
    cost."""
    means = setting_means(rows)
    fronts = [pareto_front(mine[quality], mine[cost]) for _, mine in means.groupby("stratum", sort=False)]
    return means.assign(front=pd.concat(fronts) if fronts else pd.Series(dtype=bool))


def front_rows(rows: pd.DataFrame, metric: str = METRIC, mode: str = "min") -> pd.DataFrame:
    """Of the rows of `load_results` the trials of settings on the front of their stratum, at the best learning rate of
    each by `metric`, and the dense models beside them."""
    frame = with_settings(rows, metric, mode)
    usable = tuned(frame, metric, mode)
    means = pareto(usable)
    on_front = set(means.loc[means["front"].astype(bool), "setting"])
    dense = frame[(frame["recovery"] == "dense") & (frame["status"] == "finished")]
    return rows[rows.index.isin(usable.index[usable["setting"].isin(on_front)].union(dense.index))]
