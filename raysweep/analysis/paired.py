"""Verdicts on differences that were measured on the same seeds: better, worse, equivalent or undecided.

Equivalent is a finding of its own, that the difference lies within a margin, by two one-sided tests (Schuirmann 1987,
J. Pharmacokinet. Biopharm. 15:657). What is neither shown to differ nor to be equivalent is undecided. All verdicts of
a report are corrected together (Holm 1979, Scand. J. Statist. 6:65): with the probability `ALPHA` at most there is a
wrong one among those that differ, and likewise among those that are equivalent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

ALPHA = 0.05
POWER = 0.8  # with which so many more seeds would decide; the usual one
LEAST_SEEDS = 3  # that say anything of a spread; assumption
RESAMPLES, INTERVALS_FROM = 2000, 3  # of a bootstrap, and pairs from which it is made; assumptions
MOST_SEEDS = 100  # beyond which "more seeds" is no advice
BETTER, WORSE, EQUIVALENT, UNDECIDED = "better", "worse", "equivalent", "undecided"


@dataclass(frozen=True)
class Margin:
    """Differences up to the larger of both count as nothing. absolute: in units of the measure;  relative: of the
    reference's mean"""

    absolute: float = 0.1
    relative: float = 0.01

    def at(self, reference: float) -> float:
        return max(self.absolute, self.relative * abs(reference))


def difference(values: Sequence[float], references: Sequence[float], margin: Margin) -> dict[str, Any]:
    """What a paired comparison says by itself: values and references (seeds,) were measured on the same seeds.

    Raises ValueError where their numbers differ. Returns seeds, mean, reference_mean, difference (of the means), spread
    (standard deviation of the differences), low and high (95 % interval of the difference, Student's t), margin,
    p_difference (two-sided t test of no difference) and p_equivalence (two one-sided t tests against the margin). With
    one seed spread, interval and p are NaN, without any all numbers are.
    """
    pairs = np.asarray(list(zip(values, references, strict=True)), dtype=float).reshape(-1, 2)
    mean, reference = pairs.mean(axis=0).tolist() if len(pairs) else (math.nan, math.nan)
    found = {
        "seeds": len(pairs),
        "mean": mean,
        "reference_mean": reference,
        "difference": mean - reference,
        "margin": margin.at(reference),
    }
    return found | _tested(pairs, found["margin"])


def _tested(pairs: np.ndarray[Any, Any], margin: float) -> dict[str, float]:
    differences = pairs[:, 0] - pairs[:, 1]
    if len(differences) < 2:
        return dict.fromkeys(("spread", "low", "high", "p_difference", "p_equivalence"), math.nan)
    spread, mean = float(differences.std(ddof=1)), float(differences.mean())
    rounding = 4 * np.finfo(float).eps * float(np.abs(pairs).max())
    if spread <= rounding:  # the same on every seed: nothing was left to chance
        mean = 0.0 if abs(mean) <= rounding else mean
        tests = {"p_difference": float(mean == 0), "p_equivalence": float(abs(mean) >= margin)}
        return {"spread": 0.0, "low": mean, "high": mean} | tests
    from statsmodels.stats.weightstats import DescrStatsW

    statistics = DescrStatsW(differences)
    low, high = statistics.tconfint_mean(ALPHA)
    return {
        "spread": spread,
        "low": float(low),
        "high": float(high),
        "p_difference": float(statistics.ttest_mean(0.0)[1]),
        "p_equivalence": float(statistics.ttost_mean(-margin, margin)[0]),
    }


def ratio(values: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """How many times the references the values are, pairs of positive numbers: ratio (geometric mean over pairs), low
    and high (95 % interval by the bootstrap over pairs, bias-corrected and accelerated; NaN with fewer than three)."""
    logarithms = np.log(np.asarray(values, dtype=float)) - np.log(np.asarray(references, dtype=float))
    mean = float(logarithms.mean()) if len(logarithms) else math.nan
    low = high = math.nan
    if len(logarithms) >= INTERVALS_FROM:
        low, high = _bootstrapped(logarithms, mean)
    return {"ratio": math.exp(mean), "low": math.exp(low), "high": math.exp(high)}


def _bootstrapped(values: np.ndarray[Any, Any], mean: float) -> tuple[float, float]:
    if np.ptp(values) == 0:
        return mean, mean
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=1 - ALPHA, rng=np.random.default_rng(0)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def judged(comparisons: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of a report with two columns more: verdict (of the value against its reference; less is better),
    and decisive (the corrected p that it rests on; of an undecided one the smaller one, NaN where nothing could be
    tested)."""
    frame = comparisons.reset_index(drop=True)
    differs, equals = (_corrected(frame[f"p_{kind}"]) for kind in ("difference", "equivalence"))
    is_better = frame["difference"] < 0
    verdicts = np.select(
        [equals <= ALPHA, (differs <= ALPHA) & is_better, differs <= ALPHA],
        [EQUIVALENT, BETTER, WORSE],
        UNDECIDED,
    )
    decisive = np.select([equals <= ALPHA, differs <= ALPHA], [equals, differs], np.fmin(differs, equals))
    return frame.assign(verdict=verdicts, decisive=decisive)


def advised(judged_ones: pd.DataFrame) -> pd.DataFrame:
    """What `judged` gave with a column more_seeds: how many more would decide an undecided comparison, difference and
    spread staying as they are; 0 for the others, NaN where more than `MOST_SEEDS` would be needed."""
    rows = judged_ones.to_dict("records")
    more = [_more_seeds(row, len(rows)) if row["verdict"] == UNDECIDED else 0.0 for row in rows]
    return judged_ones.assign(more_seeds=pd.Series(more, dtype=float))


def _corrected(p_values: pd.Series) -> np.ndarray[Any, Any]:
    """By Holm's method; of comparisons that could not be tested NaN, and they count among all that were asked."""
    if p_values.empty:
        return np.array([])
    from statsmodels.stats.multitest import multipletests

    corrected = multipletests(p_values.fillna(1.0), alpha=ALPHA, method="holm")[1]
    return np.where(p_values.isna(), np.nan, corrected)


def _more_seeds(row: Mapping[Any, Any], comparisons: int) -> float:
    """With a test at the level that is left to one of so many comparisons, whichever of both verdicts needs fewer."""
    seeds, spread = int(row["seeds"]), row["spread"]
    if math.isnan(spread):
        return float(LEAST_SEEDS - seeds)
    if spread == 0:
        return math.nan
    level, size = ALPHA / comparisons, abs(row["difference"])
    effects = {"two-sided": size / spread, "larger": (row["margin"] - size) / spread}
    needed = [_seeds_for(effect, level, side, seeds) for side, effect in effects.items() if effect > 0]
    return min((float(count - seeds) for count in needed if not math.isnan(count)), default=math.nan)


def _seeds_for(effect: float, level: float, side: str, known: int) -> float:
    """The smallest number of seeds with which a t test finds the effect (in standard deviations) with `POWER`."""
    from statsmodels.stats.power import ttest_power

    low, high = known, known + MOST_SEEDS
    if ttest_power(effect, high, level, high - 1, alternative=side) < POWER:
        return math.nan
    while high - low > 1:
        middle = (low + high) // 2
        enough = ttest_power(effect, middle, level, middle - 1, alternative=side) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return float(high)


def in_words(row: Mapping[Any, Any]) -> str:
    """A verdict as a sentence: `block is equivalent to subblock: +0.012 perplexity (-0.03 to +0.05), margin 0.1`."""
    name, other, verdict = row["value"], row["reference"], row["verdict"]
    if not row["seeds"]:
        return f"{name} and {other} have no seed in common"
    if row["seeds"] == 1:
        seen = f"{row['difference']:+.3g} perplexity"
        return f"{name} against {other} is undecided: {seen}; one seed says nothing of chance"
    interval = "" if math.isnan(row["low"]) else f" ({row['low']:+.3g} to {row['high']:+.3g})"
    numbers = f"{row['difference']:+.3g} perplexity{interval}, margin {row['margin']:.3g}"
    if verdict == EQUIVALENT:
        return f"{name} is equivalent to {other}: {numbers}"
    if verdict != UNDECIDED:
        return f"{name} is {verdict} than {other}: {numbers}"
    return f"{name} against {other} is undecided: {numbers}; {seeds_in_words(row['more_seeds'])}"


def seeds_in_words(more: float) -> str:
    if math.isnan(more):
        return f"more than {MOST_SEEDS} more seeds would be needed to decide"
    return f"about {more:.0f} more seed{'' if more == 1 else 's'} would decide"
