"""Criteria: what each method makes of the mask of each, and what is left of the differences between them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from raysweep.analysis.figures import style
from raysweep.analysis.figures.style import Drawn, handles, in_order, looks, new_figure, readable, room_for
from raysweep.analysis.report import Report
from raysweep.analysis.settings import CHOICE, PRUNED_ONLY, QUALITY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELL_WIDTH, CELL_HEIGHT = 60, 38
MOST_ROWS, MOST_COLUMNS = 40, 12


def heat(report: Report, stratum: str, words: str, dense: float | None) -> Drawn | None:
    """The best setting of every mask and method, chosen as all others are."""
    mine = report.settings[report.settings["stratum"] == stratum]
    best = mine[mine[QUALITY].notna()].sort_values(CHOICE, kind="stable").drop_duplicates(["mask", "method"])
    if best.empty:
        return None
    table = best.pivot(index="mask", columns="method", values=QUALITY)
    spreads = best.pivot(index="mask", columns="method", values="spread")
    order = table.mean(axis=1).sort_values().index
    rows, columns = list(order)[:MOST_ROWS], in_order(table.columns)[:MOST_COLUMNS]
    left = room_for(rows)
    width = max(style.WIDTH, left + CELL_WIDTH * len(columns) + style.RIGHT)
    height = style.TOP + style.BOTTOM + CELL_HEIGHT * len(rows)
    figure, axes = new_figure(words, width=width, height=height, left=left)
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks([place + 0.5 for place in range(len(columns))], [_two_lines(name) for name in columns])
    axes.set_yticks([place + 0.5 for place in range(len(rows))], [readable(mask) for mask in rows])
    axes.tick_params(labelcolor=style.INK)
    steps, beyond = _steps(table.loc[rows, columns])
    lowest = float(np.nanmin(table.to_numpy(float)))
    for down, mask in enumerate(rows):
        for across, method in enumerate(columns):
            value, spread = float(table[method][mask]), float(spreads[method][mask])
            _cell(axes, across, down, (value, spread), float(steps[method][mask]), value == lowest)
    left_out = len(table.index) - len(rows) + len(table.columns) - len(columns)
    notes = [f"{left_out} criteria or methods more are in the table of trials"] if left_out else []
    if beyond:
        notes.append("Colors span the recovered models; what is worse without recovery has the palest")
    return figure, {}, ". ".join(notes)


def _steps(table: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """By cell the number of its color, by the logarithm; and whether what is only pruned lies beyond the palest."""
    logs: pd.DataFrame = table.apply(np.log)
    recovered = logs.drop(columns=PRUNED_ONLY, errors="ignore")
    scale = recovered if recovered.notna().any(axis=None) else logs
    low, high = float(np.nanmin(scale.to_numpy())), float(np.nanmax(scale.to_numpy()))
    share = (logs - low) / ((high - low) or 1.0)
    last = len(style.STEPS) - 1
    return ((1 - share.clip(0, 1)) * last).round(), bool((logs > high).any(axis=None))


def _cell(axes: Axes, across: int, down: int, numbers: tuple[float, float], step: float, best: bool) -> None:
    from matplotlib.patches import Rectangle

    value, spread = numbers
    if math.isnan(value):
        axes.text(across + 0.5, down + 0.5, "\N{EN DASH}", ha="center", va="center", color=style.MUTED)
        return
    color = style.STEPS[int(step)]
    axes.add_patch(
        Rectangle((across, down), 1, 1, facecolor=color, edgecolor=style.SURFACE, linewidth=2, zorder=1)
    )
    ink = style.ON_STRONG if step >= style.STRONG_FROM else style.ON_PALE
    told = not math.isnan(spread)
    axes.text(
        across + 0.5,
        down + (0.4 if told else 0.5),
        _perplexity(value),
        ha="center",
        va="center",
        color=ink,
        fontsize=style.TEXT,
        fontweight="bold" if best else "normal",
    )
    if told:
        axes.text(
            across + 0.5,
            down + 0.76,
            f"± {spread:.3f}" if spread < 1 else f"± {spread:.2f}",
            ha="center",
            va="center",
            color=ink,
            fontsize=8.5,
        )


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e5 else f"{value:.1e}"


def _two_lines(name: str) -> str:
    return readable(name).replace(" ", "\n", 1)


def before_and_after(report: Report, stratum: str, words: str, dense: float | None) -> Drawn | None:
    """A line a mask, from the model that is only pruned to what each method makes of it."""
    mine = report.settings[(report.settings["stratum"] == stratum) & report.settings[QUALITY].notna()]
    best = mine.sort_values(CHOICE, kind="stable").drop_duplicates(["mask", "method"])
    table = best.pivot(index="mask", columns="method", values=QUALITY)
    if PRUNED_ONLY not in table or len(table.columns) < 2:
        return None
    table = table.sort_values(PRUNED_ONLY, ascending=False, na_position="first").tail(MOST_ROWS)
    shown = looks(table.columns)
    left = room_for(table.index)
    height = style.TOP + style.BOTTOM + max(60, 26 * len(table))
    figure, axes = new_figure(words, left=left, height=height, below=style.legend_room(shown))
    values = [
        *table.to_numpy(float)[~np.isnan(table.to_numpy(float))],
        *([dense] if dense is not None else []),
    ]
    style.set_scale(axes, "x", values)
    axes.set(xlabel="perplexity", ylim=(-0.6, len(table) - 0.4))
    axes.set_yticks(range(len(table)), [readable(mask) for mask in table.index])
    axes.tick_params(axis="y", labelcolor=style.INK)
    axes.grid(visible=False, axis="y")
    if dense is not None:
        axes.axvline(dense, color=style.INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.hlines(
        range(len(table)), table.min(axis=1), table.max(axis=1), color=style.LINE, linewidth=3, zorder=1
    )
    for method, look in shown.items():
        style.mark(axes, table[method], range(len(table)), look, 46)
    style.legend_below(figure, handles(shown))
    return figure, {}, "The dashed line is the dense model." if dense is not None else ""
