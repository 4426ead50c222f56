"""What a sweep does not say yet, or cannot: trials that are not there, and questions for which there is nothing."""

from __future__ import annotations

from raysweep.analysis.ladder import HIGHEST, LOWEST, ONLY
from raysweep.analysis.page.words import count
from raysweep.analysis.questions import ALIKE, EQUAL_COMPUTE, EQUAL_DATA
from raysweep.analysis.report import Report
from raysweep.analysis.settings import QUALITY


def gaps(report: Report) -> list[str]:
    """Sentences, the most important first; empty where nothing is missing."""
    return [*_trials(report), *_kinds(report), *_chance(report), *_rates(report), *_measures(report)]


def _trials(report: Report) -> list[str]:
    states = report.rows["status"].value_counts()
    said = []
    if report.missing:
        said.append(
            f"{count(len(report.missing), 'planned trial')} without a row: what is said here may change. "
            "`raysweep launch` runs them."
        )
    if stopped := int(states.get("stopped", 0)):
        said.append(f"{count(stopped, 'trial')} stopped early by the scheduler: in no comparison.")
    if failed := int(states.get("failed", 0)):
        said.append(f"{count(failed, 'trial')} failed; the reasons are below.")
    if report.space is None:
        said.append(
            "The sweep's folder has no space.yaml that can be read: no recipes, and planned trials are unknown."
        )
    return said


def _kinds(report: Report) -> list[str]:
    done = report.rows[report.rows["status"] == "finished"]
    there = set(done["recovery"])
    said = []
    if "dense" not in there:
        said.append("No dense model: how much pruning loses cannot be told.")
    if not there - {"dense"}:
        return [*said, "No pruned model yet: there is nothing to compare."]
    if "none" not in there:
        said.append("No model that is only pruned: what recovery wins back cannot be told.")
    if "reconstruct" not in there:
        said.append("No reconstruction: granularities, streams and losses cannot be compared.")
    if "retrain" not in there:
        said.append("No retraining: whether reconstruction does as well, and for how much less, is open.")
    elif "reconstruct" in there:
        said += _retraining(report)
    return said


def _retraining(report: Report) -> list[str]:
    asked = set(report.comparisons["question"])
    wanted = {EQUAL_DATA: "on as many tokens", EQUAL_COMPUTE: "in as much device time"}
    lacking = [words for question, words in wanted.items() if question not in asked]
    if not lacking:
        return []
    return [
        f"No retraining of the same masks {' or '.join(lacking)} as reconstruction (within {ALIKE:g} times): shorter "
        "or longer ones, by `epochs` or `data.num_samples`, would answer that."
    ]


def _chance(report: Report) -> list[str]:
    if report.comparisons.empty:
        return []
    few = int((report.comparisons["seeds"] < 2).sum())
    said = []
    if few == len(report.comparisons):
        said.append(
            "One seed: a difference cannot be told from chance, so every comparison is undecided. "
            "`calibration.seed: [0, 1, 2]` adds two draws."
        )
    elif few:
        said.append(f"{count(few, 'comparison')} on a single seed, which decides nothing.")
    left_out = int((report.comparisons["missing"] > 0).sum())
    if left_out:
        said.append(f"{count(left_out, 'comparison')} without pairs of which one side is not there.")
    return said


def _rates(report: Report) -> list[str]:
    if report.learning_rates.empty:
        return []
    places = report.learning_rates["place"].value_counts()
    said = []
    if edge := int(places.get(LOWEST, 0) + places.get(HIGHEST, 0)):
        said.append(
            f"{count(edge, 'setting')} with the best learning rate at an end of the ladder that was tried: a better "
            "one may lie beyond."
        )
    if only := int(places.get(ONLY, 0)):
        said.append(
            f"{count(only, 'setting')} with one learning rate, which need not be a good one: comparisons may be unfair."
        )
    return said


def _measures(report: Report) -> list[str]:
    done = report.rows[(report.rows["status"] == "finished") & (report.rows["recovery"] != "dense")]
    if done.empty:
        return []
    said, metric = [], report.search.metric
    if metric not in done or done[metric].isna().all():
        said.append(f"No {metric}: learning rates and recipes are chosen by it, so there are none.")
    if done[QUALITY].isna().all():
        said.append("No perplexity on test text: there are no figures of it.")
    if report.depth.empty:
        said.append("No errors by block: there is no figure of depth.")
    return said
