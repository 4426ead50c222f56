"""The verdicts of a report as the page shows them: question by question, in words, with a picture of the interval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raysweep.analysis import questions
from raysweep.analysis.paired import ALPHA, BETTER, EQUIVALENT, UNDECIDED, WORSE, in_words
from raysweep.analysis.report import Report

MARKS = {BETTER: "+", WORSE: "\N{MINUS SIGN}", EQUIVALENT: "=", UNDECIDED: "?"}
TITLES = {
    questions.GRANULARITY: "Which granularity reconstructs best?",
    questions.BEFORE: "Do criteria differ before recovery?",
    questions.AFTER: "Do criteria still differ after reconstruction?",
    questions.EQUAL_DATA: "Reconstruction or retraining, on equal data?",
    questions.EQUAL_COMPUTE: "Reconstruction or retraining, in equal device time?",
}
MARGINS_SHOWN = 4.0  # the picture of an interval reaches so many margins to both sides


@dataclass(frozen=True)
class Interval:
    """A picture of difference and interval, in hundredths of its width; the margin is from `band` to 100 - `band`.

    low, high: ends of the interval, none where there is none;  beyond: -1 or 1 where the difference lies outside
    """

    middle: float
    low: float | None
    high: float | None
    beyond: int
    band: float = 50 - 50 / MARGINS_SHOWN

    @classmethod
    def of(cls, row: Mapping[Any, Any]) -> Interval | None:
        if math.isnan(row["difference"]) or not row["margin"]:
            return None

        def place(value: float) -> float:
            share = float(value / row["margin"] / MARGINS_SHOWN)
            return round(50 + 50 * max(-1.0, min(1.0, share)), 2)

        known = not math.isnan(row["low"])
        beyond = abs(row["difference"]) > MARGINS_SHOWN * row["margin"]
        return cls(
            middle=place(row["difference"]),
            low=place(row["low"]) if known else None,
            high=place(row["high"]) if known else None,
            beyond=int(math.copysign(1, row["difference"])) if beyond else 0,
        )


@dataclass(frozen=True)
class Finding:
    """One verdict. about: what its numbers are the mean over"""

    verdict: str
    mark: str
    sentence: str
    interval: Interval | None
    about: str


@dataclass(frozen=True)
class Question:
    """All findings on one question. groups: by words of the stratum;  tally: how often each verdict"""

    title: str
    groups: dict[str, list[Finding]]
    tally: list[tuple[str, int]]


def findings(report: Report) -> list[Question]:
    """In the order in which the report asks."""
    comparisons = report.comparisons
    asked = list(dict.fromkeys(comparisons["question"]))
    return [_question(report, question) for question in asked]


def _question(report: Report, question: str) -> Question:
    groups: dict[str, list[Finding]] = {}
    for row in report.of(question).to_dict("records"):
        groups.setdefault(report.strata[row["stratum"]], []).append(_finding(row))
    verdicts = Counter(one.verdict for group in groups.values() for one in group)
    title = TITLES.get(question, f"Effect of {question}")
    return Question(title, groups, [(verdict, verdicts[verdict]) for verdict in MARKS if verdicts[verdict]])


def _finding(row: Mapping[Any, Any]) -> Finding:
    seeds, contexts, missing = int(row["seeds"]), int(row["contexts"]), int(row["missing"])
    about = f"{seeds} seed{'s' * (seeds != 1)}"
    if contexts > 1:
        about += f", each the mean over {contexts} combinations of what is not asked about"
    if missing:
        about += f"; {missing} pair{'s' * (missing != 1)} left out, of which one side is not there"
    if not math.isnan(row["decisive"]):
        about += f"; corrected p {row['decisive']:.2g}"
    if row["verdict"] in (BETTER, WORSE) and max(-row["low"], row["high"]) < row["margin"]:
        about += "; a difference, but one smaller than the margin"
    return Finding(row["verdict"], MARKS[row["verdict"]], in_words(row), Interval.of(row), about)


def method_in_words(report: Report) -> list[str]:
    """What the verdicts of this report mean, in two sentences."""
    margin, asked = report.margin, len(report.comparisons)
    metric = report.search.metric.replace("_", " ")
    parts = [f"{margin.absolute:g} perplexity"] if margin.absolute else []
    parts += [f"{100 * margin.relative:g} % of the reference's mean"] if margin.relative else []
    larger = " or ".join(parts) + (", whichever is larger" if len(parts) > 1 else "")
    return [
        f"Every comparison pairs the values of equal seeds, at learning rates chosen by {metric}, in "
        f"perplexity on test text; intervals are those of the mean difference at {100 * (1 - ALPHA):.0f} %, by "
        "Student's t, each by itself, and say nothing of other models or texts.",
        "Better and worse mean that a two-sided paired t test finds a difference, equivalent that two one-sided t "
        f"tests (TOST) find it smaller than the margin, {larger}; both kinds of p values are corrected by Holm's "
        f"method over all {asked} comparisons of this report at {100 * ALPHA:.0f} %, and what neither shows is "
        "undecided, which is not the same as equal.",
    ]
