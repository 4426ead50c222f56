"""How all figures look: colors that color-blind people tell apart, a shape for every color, one size of text.

A point of matplotlib is a pixel of the page. Every color here is used for one purpose alone, so that the page can
replace it by a variable that is another color in the dark (`svg.inline`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeAlias

from raysweep.analysis.settings import PRUNED_ONLY, RETRAINING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Drawn: TypeAlias = "tuple[Figure, dict[str, list[str]], str]"
"""A figure, by gid of its markers what is said about each, and a note on what it leaves out."""

POINTS_PER_INCH = 72
WIDTH, HEIGHT = 380, 284  # of a figure, without its legend
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 36, 42  # around its axes
LEGEND_LINE = 18
LONG_LABEL = 15  # letters, from which a legend has two columns
TEXT, SMALL = 12.0, 10.5
LETTER = 6.4  # mean width of a letter of that size
LOGARITHMIC_FROM = 4  # largest over smallest value from which an axis is logarithmic; assumption

INK, MUTED, LINE, SURFACE = "#1b1f24", "#5a626c", "#e3e6ea", "#fefefe"
STEPS = (
    "#f3f7fb",
    "#dfeaf5",
    "#c6dbee",
    "#a8c9e5",
    "#86b3d9",
    "#629aca",
    "#4280b7",
    "#28669f",
    "#124d84",
)
"""From the best to the worst cell of a heat map."""
ON_PALE, ON_STRONG, STRONG_FROM = (
    "#1b1f25",
    "#fdfdfd",
    5,
)  # text in cells of the first steps, and of the others

COLORS = {
    "blue": "#0b6cb3",
    "orange": "#cc5510",
    "green": "#118066",
    "olive": "#7a7a12",
    "magenta": "#b0438f",
    "brown": "#8a5a2b",
    "violet": "#5d43b3",
    "lilac": "#8f7fd9",
    "gray": "#7b838d",
}
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    SURFACE: "surface",
    ON_PALE: "on-pale",
    ON_STRONG: "on-strong",
    **{color: f"step-{step}" for step, color in enumerate(STEPS)},
    **{color: name for name, color in COLORS.items()},
}
"""By color the variable of the page's style sheet."""


@dataclass(frozen=True)
class Look:
    """Of a method in every figure. color: a name of `COLORS`;  marker: of matplotlib"""

    color: str
    marker: str

    @property
    def hex(self) -> str:
        return COLORS[self.color]


LOOKS = {
    PRUNED_ONLY: Look("gray", "X"),
    "matrix": Look("green", "s"),
    "matrix exact": Look("olive", "D"),
    "subblock": Look("blue", "o"),
    "block": Look("orange", "^"),
    "model": Look("brown", "p"),
    RETRAINING: Look("violet", "P"),
    f"{RETRAINING} after reconstruction": Look("lilac", "*"),
}
OTHERS = (Look("magenta", "v"), Look("magenta", ">"), Look("magenta", "<"), Look("magenta", "h"))  # windows


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """By method how it looks, in the order in which methods are named everywhere."""
    ordered = in_order(methods)
    others = cycle(OTHERS)
    return {method: LOOKS[method] if method in LOOKS else next(others) for method in ordered}


def in_order(methods: Iterable[str]) -> list[str]:
    """Known methods in the order of `LOOKS`, others, which are windows of blocks, before the whole model."""
    known = list(LOOKS)
    unknown = known.index("model") - 0.5
    return sorted(
        set(methods),
        key=lambda method: (known.index(method) if method in known else unknown, len(method), method),
    )


@contextmanager
def styled() -> Iterator[None]:
    """Figures are made and written within: nothing of a user's own settings of matplotlib enters them."""
    from matplotlib import style

    settings = {
        "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same figure everywhere
        "font.size": SMALL,
        "axes.titlesize": TEXT,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.labelsize": SMALL,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": LINE,
        "grid.linewidth": 0.8,
        "text.color": INK,
        "axes.titlecolor": INK,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": SMALL,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "raysweep",
        "text.parse_math": False,  # a dollar in a name is a dollar
    }
    with style.context(["default", settings]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in files; the page has the reader's fonts
        yield


def new_figure(
    title: str, width: float = WIDTH, height: float = HEIGHT, left: float = LEFT, below: float = 0
) -> tuple[Figure, Axes]:
    """One pair of axes with the same margins in all figures. below: more room under the axes, for a legend"""
    from matplotlib.figure import Figure

    whole = height + below
    figure = Figure(figsize=(width / POINTS_PER_INCH, whole / POINTS_PER_INCH))
    across, up = (width - left - RIGHT) / width, (height - TOP - BOTTOM) / whole
    axes = figure.add_axes((left / width, (BOTTOM + below) / whole, across, up))
    axes.set_title(title, x=-left / (width - left - RIGHT) + 0.005)
    return figure, axes


def room_for(words: Iterable[Any]) -> float:
    """Left of axes whose ticks are such words."""
    return min(150.0, 12 + LETTER * max((len(readable(word)) for word in words), default=0))


def legend_room(labels: Iterable[str]) -> float:
    """Under the axes, for a legend of these."""
    known = list(labels)
    return LEGEND_LINE * math.ceil(len(known) / _columns(known)) + 6 if known else 0


def _columns(labels: Iterable[str]) -> int:
    return 2 if any(len(label) > LONG_LABEL for label in labels) else 3


def legend_below(figure: Figure, entries: Sequence[Line2D]) -> None:
    if entries:
        figure.legend(
            handles=list(entries),
            loc="lower left",
            bbox_to_anchor=(0.0, 0.0),
            ncols=_columns(str(entry.get_label()) for entry in entries),
            handletextpad=0.3,
            columnspacing=1.0,
            labelspacing=0.45,
            borderaxespad=0.2,
            labelcolor=INK,
        )


def handles(shown: Mapping[str, Look], line: bool = False) -> list[Line2D]:
    from matplotlib.lines import Line2D

    return [
        Line2D(
            [],
            [],
            color=look.hex,
            marker=look.marker,
            markersize=6.5,
            markeredgecolor=SURFACE,
            markeredgewidth=0.8,
            linewidth=1.5 if line else 0,
            label=readable(method),
        )
        for method, look in shown.items()
    ]


def mark(axes: Axes, across: Any, up: Any, look: Look, sizes: Any, gid: str | None = None) -> None:
    """Markers of one method. sizes: their areas, one or several"""
    axes.scatter(
        across,
        up,
        s=sizes,
        marker=look.marker,
        c=look.hex,
        edgecolors=SURFACE,
        linewidths=0.8,
        zorder=3,
        gid=gid,
    )


def readable(text: Any) -> str:
    """Without characters that no font shows and no XML may hold."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text))


def scale_for(values: Sequence[float]) -> str:
    """linear or log, by how far positive values lie apart."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    return "log" if low > 0 and high / low > LOGARITHMIC_FROM else "linear"


def set_scale(axes: Axes, which: str, values: Sequence[float]) -> None:
    """The scale of an axis (`x` or `y`) with a little room at both ends and ticks that are plain round numbers."""
    scale = scale_for(values)
    low, high = min(values), max(values)
    if scale == "log":
        room = (high / low) ** 0.06
        ends = (low / room, high * room)
    else:
        room = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
        ends = (low - room, high + room)
    axes.set(**{f"{which}scale": scale, f"{which}lim": ends})
    plain_ticks(axes.xaxis if which == "x" else axes.yaxis, *ends, scale)


def plain_ticks(axis: Axis, low: float, high: float, scale: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axis.set_minor_locator(NullLocator())
    if scale == "log":
        axis.set_major_locator(FixedLocator(round_numbers(low, high)))
    else:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick_words(value)))


def round_numbers(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis from low to high, three to seven where there are such."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [digit * 10.0**power for power in decades for digit in digits]
        found = [tick for tick in ticks if low <= tick <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 7)]
    return found


def tick_words(value: float) -> str:
    """1e-4 where zeros would be many; 20,000"""
    if value and abs(value) < 0.0099:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:,.10g}" if abs(value) < 1e6 else f"{value:.0e}".replace("e+0", "e")
