"""The tables of the page: what they show, and by what they are sorted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from raysweep.analysis.figures.style import in_order
from raysweep.analysis.page import words
from raysweep.analysis.questions import COSTS
from raysweep.analysis.report import Report
from raysweep.analysis.rows import records, trial_label
from raysweep.analysis.settings import METRIC, QUALITY, STRATUM_COLUMNS, keys_of, method_of
from raysweep.config.calibration import CALIBRATION_COLUMNS
from raysweep.config.trial import Trial

SECONDS, FLOPS, TOKENS, MEMORY = COSTS
COST_WORDS = {
    SECONDS: "standalone seconds",
    FLOPS: "training operations",
    TOKENS: "distinct tokens",
    MEMORY: "memory of recovery",
}


WORD, LABEL = "word", "label"


@dataclass(frozen=True)
class Column:
    """title: what it is, with the unit;  kind: number (aligned to the right), word, or label, which may wrap"""

    title: str
    kind: str = "number"


@dataclass(frozen=True)
class Cell:
    """text: what is shown;  value: by what it is sorted, none comes last"""

    text: str
    value: float | str | None


@dataclass(frozen=True)
class Table:
    """name: for those who hear the page, and for its filter"""

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


def _number(value: Any, how: Callable[[Any], str]) -> Cell:
    missing = pd.isna(value)
    return Cell(words.NOTHING, None) if missing else Cell(how(float(value)), float(value))


def _text(value: Any) -> Cell:
    return Cell(str(value), str(value))


def front_table(report: Report) -> Table | None:
    """Settings that no other one of their stratum beats in quality without taking more device time."""
    front = (
        report.settings[report.settings["front"].astype(bool)] if len(report.settings) else report.settings
    )
    if front.empty:
        return None
    strata = list(report.strata)
    rows = [
        [
            _text(report.strata[row["stratum"]]),
            _text(row["label"]),
            _number(row[QUALITY], words.perplexity),
            _number(row["spread"], words.spread),
            _number(row["seeds"], words.whole),
            _number(row.get(SECONDS), words.seconds),
            _number(row.get(MEMORY), words.mebibytes),
        ]
        for row in sorted(
            front.to_dict("records"), key=lambda row: (strata.index(row["stratum"]), row[SECONDS])
        )
    ]
    columns = [
        Column("stratum", WORD),
        Column("setting", LABEL),
        Column("perplexity"),
        Column("spread"),
        Column("seeds"),
        Column("device s"),
        Column("recovery MiB"),
    ]
    return Table("Settings on the front of perplexity against standalone seconds", columns, rows)


def cost_table(report: Report) -> Table | None:
    """Of every method the means over masks and seeds."""
    if report.costs.empty:
        return None
    rows = [
        [
            _text(report.strata[row["stratum"]]),
            _text(row["method"]),
            _number(row["trials"], words.whole),
            _number(row.get(QUALITY), words.perplexity),
            _number(row.get("output_error_calibration"), words.error),
            _number(row.get(SECONDS), words.seconds),
            _number(row.get(MEMORY), words.mebibytes),
            _number(row.get(TOKENS), words.whole),
            _number(row.get(FLOPS), words.operations),
        ]
        for row in _by_method(report)
    ]
    columns = [
        Column("stratum", WORD),
        Column("method", WORD),
        Column("trials"),
        Column("perplexity"),
        Column("output error"),
        Column("device s"),
        Column("recovery MiB"),
        Column("tokens"),
        Column("operations"),
    ]
    return Table("What each method gives and takes", columns, rows)


def _by_method(report: Report) -> list[dict[Any, Any]]:
    """Stratum by stratum, methods in the order of all figures."""
    strata, methods = list(report.strata), in_order(report.costs["method"])
    return sorted(
        report.costs.to_dict("records"),
        key=lambda row: (strata.index(row["stratum"]), methods.index(row["method"])),
    )


def ratio_table(report: Report) -> Table | None:
    """How many times the cost of reconstruction retraining takes, a column for each cost."""
    if report.ratios.empty:
        return None
    shown = [cost for cost in COSTS if (report.ratios["cost"] == cost).any()]
    rows = []
    for (stratum, method), mine in report.ratios.groupby(["stratum", "method"], sort=False):
        by_cost = {row["cost"]: row for row in mine.to_dict("records")}
        ratios = [_ratio(by_cost.get(cost)) for cost in shown]
        pairs = _number(mine["pairs"].max(), words.whole)
        rows.append([_text(report.strata[str(stratum)]), _text(f"retraining / {method}"), *ratios, pairs])
    measured = [Column(COST_WORDS[cost]) for cost in shown]
    columns = [Column("stratum", WORD), Column("of", WORD), *measured, Column("pairs")]
    return Table("How many times the cost of reconstruction retraining takes", columns, rows)


def _ratio(row: Mapping[Any, Any] | None) -> Cell:
    """8.19 (7.93 to 8.47)"""
    if row is None:
        return Cell(words.NOTHING, None)
    low, high = words.times(row["low"]), words.times(row["high"])
    interval = "" if words.is_missing(row["low"]) or low == high else f" ({low} to {high})"
    return Cell(f"{words.times(row['ratio'])}{interval}", float(row["ratio"]))


def rate_table(report: Report) -> Table | None:
    """The best learning rate of every setting."""
    if report.learning_rates.empty:
        return None
    rows = [
        [
            _text(report.labels.get(row["setting"], "")),
            _number(row["learning_rate"], words.short),
            _number(row["mean"], words.perplexity if report.search.metric == METRIC else words.short),
            _number(row["tried"], words.whole),
            _number(row["seeds"], words.whole),
            _text(row["place"]),
        ]
        for row in report.learning_rates.to_dict("records")
    ]
    columns = [
        Column("setting", LABEL),
        Column("best rate"),
        Column(report.search.metric.replace("_", " ")),
        Column("tried"),
        Column("seeds"),
        Column("where it lies", WORD),
    ]
    return Table("The best learning rate of every setting", columns, rows)


TRIAL_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("label", "trial", LABEL),
    ("stratum", "stratum", "choice"),
    ("method", "method", "choice"),
    ("status", "status", "choice"),
    (QUALITY, "perplexity", "perplexity"),
    (METRIC, "validation", "perplexity"),
    ("output_error_calibration", "output error", "error"),
    (SECONDS, "device s", "seconds"),
    (MEMORY, "recovery MiB", "mebibytes"),
)
"""Of the table of all trials: column of the rows, title, and how its values are shown (page.js)."""

MADE = ("label", "stratum", "method")  # which are no columns of the rows
NEEDED = ("trial_id", "sparsity_by_name", *Trial.model_fields, *CALIBRATION_COLUMNS)  # for them


def trial_data(report: Report) -> dict[str, Any]:
    """All trials, for a script that shows them in portions."""
    rows = report.rows
    shown = [column for column in TRIAL_COLUMNS if column[0] in rows or column[0] in MADE]
    told = rows[[name for name in dict.fromkeys([*NEEDED, *(name for name, _, _ in shown)]) if name in rows]]
    strata = keys_of(rows, STRATUM_COLUMNS)
    table = [
        [_plain(report, row, name, stratum) for name, _, _ in shown]
        for row, stratum in zip(records(told), strata, strict=True)
    ]
    return {"columns": [{"title": title, "kind": kind} for _, title, kind in shown], "rows": table}


def _plain(report: Report, row: Mapping[str, Any], name: str, stratum: str) -> Any:
    if name == "label":
        return trial_label(row)
    if name == "method":
        return method_of(row)
    if name == "stratum":
        return report.strata.get(stratum, "")
    value = row.get(name)
    return float(f"{value:.6g}") if isinstance(value, float) else value
