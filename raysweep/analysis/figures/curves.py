"""Curves: what each learning rate gives, and how errors grow with depth."""

from __future__ import annotations

import numpy as np

from raysweep.analysis.figures import style
from raysweep.analysis.figures.style import Drawn, handles, looks, new_figure
from raysweep.analysis.report import Report
from raysweep.analysis.settings import TUNED

MOST_CURVES = 60


def rates(report: Report, stratum: str, words: str, dense: float | None) -> Drawn | None:
    about = report.settings[report.settings["stratum"] == stratum].set_index("setting")
    curves = report.curves[report.curves["setting"].isin(about.index)]
    finite = curves[np.isfinite(curves["mean"].astype(float))]
    if finite[TUNED].nunique() < 2:
        return None
    several = finite.groupby("setting")[TUNED].nunique()
    chosen = list(several[several > 1].index[:MOST_CURVES])
    if not chosen:
        return None
    shown = looks(about.loc[chosen, "method"])
    figure, axes = new_figure(words, below=style.legend_room(shown))
    drawn = finite[finite["setting"].isin(chosen)]
    style.set_scale(axes, "y", list(drawn["mean"]))
    style.set_scale(axes, "x", list(drawn[TUNED]))
    axes.set(xlabel="learning rate", ylabel=report.search.metric.replace("_", " "))
    bests = report.learning_rates
    for setting in chosen:
        look = shown[str(about["method"][setting])]
        curve = drawn[drawn["setting"] == setting].sort_values(TUNED)
        axes.plot(curve[TUNED], curve["mean"], color=look.hex, linewidth=1.2, alpha=0.75, zorder=2)
        best = bests[bests["setting"] == setting]
        style.mark(axes, best[TUNED], best["mean"], look, 40)
    style.legend_below(figure, handles(shown))
    left_out = int((several > 1).sum()) - len(chosen)
    return figure, {}, f"{left_out} curves more are not drawn" if left_out else ""


def depth(report: Report, stratum: str, words: str, dense: float | None) -> Drawn | None:
    mine = report.depth[(report.depth["stratum"] == stratum) & report.depth["error"].notna()]
    if mine.empty:
        return None
    shown = looks(mine["method"])
    figure, axes = new_figure(words, below=style.legend_room(shown))
    style.set_scale(axes, "y", list(mine["error"]))
    axes.set(
        xlabel="block", ylabel="squared error / squared target", xlim=(-0.4, float(mine["block"].max()) + 0.4)
    )
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for method, look in shown.items():
        curve = mine[mine["method"] == method]
        few = len(curve) <= 16
        axes.plot(
            curve["block"],
            curve["error"],
            color=look.hex,
            marker=look.marker,
            markersize=5.5 if few else 4,
            markevery=1 if few else max(1, len(curve) // 10),
            markeredgecolor=style.SURFACE,
            markeredgewidth=0.7,
            linewidth=1.5,
        )
    style.legend_below(figure, handles(shown, line=True))
    return figure, {}, ""
