"""The figures of a report, each of one stratum alone: pages put them side by side, papers take what they need."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raysweep.analysis.figures.curves import depth, rates
from raysweep.analysis.figures.fronts import memory, seconds
from raysweep.analysis.figures.masks import before_and_after, heat
from raysweep.analysis.figures.style import readable
from raysweep.analysis.report import Report
from raysweep.analysis.settings import MODEL_COLUMNS, QUALITY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SECONDS, MEMORY = "pareto-device-seconds", "pareto-recovery-memory"
HEAT, RECOVERY, RATES, DEPTH = "criterion-by-method", "before-and-after", "learning-rates", "error-by-depth"
KINDS = (SECONDS, MEMORY, HEAT, RECOVERY, RATES, DEPTH)


@dataclass(frozen=True)
class Panel:
    """A figure. kind: one of `KINDS`;  name: of its files, and unlike that of any other of the report
    title: in words;  tips: as of `svg.inline`;  note: what it leaves out
    """

    kind: str
    name: str
    title: str
    figure: Figure
    tips: Mapping[str, Sequence[str]] = field(default_factory=dict)
    note: str = ""


def panels(report: Report) -> Iterator[Panel]:
    """Every figure that there are numbers for, kind by kind. To be used, and written, within `style.styled`."""
    names = slugs(report.strata)
    dense = dense_quality(report)
    for kind, draw in DRAWN.items():
        for stratum, words in report.strata.items():
            drawn = draw(report, stratum, readable(words), dense.get(stratum))
            if drawn is not None:
                figure, tips, note = drawn
                yield Panel(kind, f"{kind}-{names[stratum]}", f"{TITLES[kind]}, {words}", figure, tips, note)


TITLES = {
    SECONDS: "Perplexity against standalone seconds",
    MEMORY: "Perplexity against memory of recovery",
    HEAT: "Perplexity by criterion and method",
    RECOVERY: "Criteria before and after recovery",
    RATES: "Learning rates",
    DEPTH: "Output error by depth",
}
DRAWN = {
    SECONDS: seconds,
    MEMORY: memory,
    HEAT: heat,
    RECOVERY: before_and_after,
    RATES: rates,
    DEPTH: depth,
}


def slugs(strata: Mapping[str, str]) -> dict[str, str]:
    """By stratum a short name for files: sparsity-0.6, 2-4; with a number where two would be equal."""
    made: dict[str, str] = {}
    for stratum, words in strata.items():
        plain = re.sub(r"[^A-Za-z0-9.]+", "-", words).strip("-.")[-60:].strip("-.") or "sweep"
        names = (plain, *(f"{plain}-{number}" for number in range(2, len(strata) + 1)))
        taken = {name.lower() for name in made.values()}
        made[stratum] = next(name for name in names if name.lower() not in taken)
    return made


def dense_quality(report: Report) -> dict[str, float]:
    """By stratum the perplexity of its dense model, as far as it was measured."""
    rows = report.rows
    dense = rows[(rows["recovery"] == "dense") & (rows["status"] == "finished")]
    found = {}
    for stratum, key in ((stratum, _model_of(stratum)) for stratum in report.strata):
        mine = dense
        for name, value in key.items():
            mine = mine[mine[name] == value] if name in mine else mine
        if len(values := mine[QUALITY].dropna()):
            found[stratum] = float(values.iloc[0])
    return found


def _model_of(stratum: str) -> dict[str, Any]:
    return {name: value for name, value in json.loads(stratum).items() if name in MODEL_COLUMNS}
