"""Quality against cost: every setting, and the front that no other one beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from raysweep.analysis.figures import style
from raysweep.analysis.figures.style import Drawn, handles, looks, new_figure
from raysweep.analysis.pareto import pareto_front
from raysweep.analysis.report import Report
from raysweep.analysis.settings import QUALITY

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

MIB = 1 << 20
MOST_NAMES, LONGEST_NAME = 50, 28  # points that are named, and letters of a name
# In pixels of the page: from the middle of a marker to its name, and around what a name may not touch.
GAP, CLEAR = 5, 3
NEAR = 4.0  # pixels within which a point hides another of the same look, where there are many
MANY_POINTS, MOST_POINTS = (
    200,
    1200,
)  # of one look: from which those hidden are left out, and how many are drawn


def seconds(report: Report, stratum: str, words: str, dense: float | None) -> Drawn | None:
    return _quality_against(
        report, stratum, words, dense, "device_seconds_standalone", "standalone seconds", 1
    )


def memory(report: Report, stratum: str, words: str, dense: float | None) -> Drawn | None:
    return _quality_against(
        report, stratum, words, dense, "peak_recovery_bytes", "memory of recovery, MiB", MIB
    )


def _quality_against(
    report: Report, stratum: str, words: str, dense: float | None, cost: str, title: str, unit: int
) -> Drawn | None:
    settings = report.settings
    if cost not in settings:
        return None
    points = settings[(settings["stratum"] == stratum) & settings[cost].notna() & settings[QUALITY].notna()]
    if points.empty:
        return None
    points = points.assign(
        cost=points[cost].astype(float) / unit, on_front=pareto_front(points[QUALITY], points[cost])
    )
    shown = looks(points["method"])
    figure, axes = new_figure(words, below=style.legend_room(shown))
    style.set_scale(axes, "x", list(points["cost"]))
    style.set_scale(axes, "y", [*points[QUALITY], *([dense] if dense is not None else [])])
    axes.set(xlabel=title, ylabel="perplexity")
    dense_line = _dense_line(axes, dense)
    front = points[points["on_front"]].sort_values("cost")
    axes.step(front["cost"], front[QUALITY], where="post", color=style.MUTED, linewidth=1.1, zorder=2)
    tips, hidden = {}, 0
    for place, (method, look) in enumerate(shown.items()):
        mine = points[points["method"] == method].sort_values("on_front", kind="stable")
        apart = mine[_apart(axes, mine)]
        hidden += len(mine) - len(apart)
        sizes = np.where(apart["on_front"], 62, 26)
        style.mark(axes, apart["cost"], apart[QUALITY], look, sizes, f"tips-{place}")
        tips[f"tips-{place}"] = [_tip(row, title) for row in apart.to_dict("records")]
    if points["mask"].nunique() > 1:
        _name_masks(axes, points, dense_line)
    style.legend_below(figure, handles(shown))
    note = f"{hidden:,} of {len(points):,} settings lie behind others of the same method" if hidden else ""
    return figure, tips, note


def _apart(axes: Axes, points: pd.DataFrame) -> np.ndarray[Any, Any]:
    """Which of the points to draw: all where they are few, and all on the front; of others one within `NEAR` pixels,
    farther apart where that leaves more than `MOST_POINTS`."""
    if len(points) <= MANY_POINTS:
        return np.ones(len(points), dtype=bool)
    places = axes.transData.transform(points[["cost", QUALITY]].to_numpy(float))
    on_front, near = points["on_front"].to_numpy(bool), NEAR
    while True:
        _, first = np.unique((places / near).round(), axis=0, return_index=True)
        kept = on_front.copy()
        kept[first] = True
        if kept.sum() <= max(MOST_POINTS, on_front.sum()):
            return kept
        near *= 1.5


def _name_masks(axes: Axes, points: pd.DataFrame, others: Sequence[Artist]) -> None:
    """The mask of each point on the front, below it on its left, where no setting lies. None where it would lie on
    another name, a marker, a line or one of `others`, or below another marker as if it were that one's; a long front is
    a curve without names."""
    from matplotlib.transforms import Bbox

    front = points[points["on_front"]].sort_values("cost")
    if len(front) > MOST_NAMES:
        return
    places = dict(
        zip(points.index, axes.transData.transform(points[["cost", QUALITY]].to_numpy(float)), strict=True)
    )
    # Of the front's steps the falling parts: before a name reaches a level one, it meets these.
    lines = [[places[here], (places[here][0], places[before][1])] for before, here in pairwise(front.index)]
    pixel = axes.figure.dpi / style.POINTS_PER_INCH  # of the page, in those of a file
    room, below = CLEAR * pixel, (GAP + style.SMALL) * pixel
    taken = [Bbox(ends).padded(room) for ends in lines]
    taken += [drawn.get_window_extent().padded(room) for drawn in others]
    markers = {one: Bbox([(x - room, y - below), (x + room, y + room)]) for one, (x, y) in places.items()}
    named = zip(front.index, front["mask"], front["cost"], front[QUALITY], strict=True)
    for point, mask, cost, quality in named:
        name = axes.annotate(
            _shortened(style.readable(mask)),
            (cost, quality),
            xytext=(-GAP, -GAP),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=style.SMALL,
            color=style.MUTED,
        )
        if name.get_window_extent().x0 < axes.bbox.x0:
            name.set(ha="left", position=(0, -GAP))
        box = name.get_window_extent()
        if box.y0 < axes.bbox.y0 or box.count_overlaps(
            [*taken, *(box for one, box in markers.items() if one != point)]
        ):
            name.remove()
        else:
            taken.append(box)


def _shortened(name: str) -> str:
    """Both ends of a long one, more of the last, where paths and functions differ."""
    if len(name) <= LONGEST_NAME:
        return name
    first = LONGEST_NAME // 3 - 1
    return f"{name[:first]}…{name[first + 1 - LONGEST_NAME :]}"


def _tip(row: Mapping[Any, Any], title: str) -> str:
    return f"{row['label']}\nperplexity {row[QUALITY]:.2f}, {title} {row['cost']:.3g}"


def _dense_line(axes: Axes, dense: float | None) -> list[Artist]:
    """The line with its words."""
    if dense is None:
        return []
    line = axes.axhline(dense, color=style.INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    words = axes.annotate(
        f"dense {dense:.2f}",
        (1.0, dense),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=style.SMALL,
    )
    return [line, words]
