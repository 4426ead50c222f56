"""All that a sweep answers, put together once: what the page, notebooks and scripts show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from raysweep.analysis import questions
from raysweep.analysis.depth import error_by_depth
from raysweep.analysis.ladder import best_learning_rates, learning_rate_curves, tuned
from raysweep.analysis.paired import Margin, advised, judged
from raysweep.analysis.pareto import pareto
from raysweep.analysis.recipe import recipe_yaml, recommended
from raysweep.analysis.rows import failures, records
from raysweep.analysis.settings import (
    finished,
    keys_of,
    setting_labels,
    stratum_words,
    trial_labels,
    with_settings,
)
from raysweep.config.calibration import CALIBRATION_COLUMNS
from raysweep.config.sections import SearchConfig
from raysweep.config.space import SearchSpace
from raysweep.config.trial import Trial
from raysweep.results.schema import planned_columns

PLANNED_COLUMNS = (
    "model",
    *CALIBRATION_COLUMNS,
    "sparsity_by_name",
    *Trial.model_fields,
)  # of a trial, before it runs


@dataclass(frozen=True)
class Report:
    """The answers of one sweep, or of several whose rows were put together.

    rows: as `load_results` gave them;  margin: within which differences count as nothing
    labels, strata: words for the keys `setting` and `stratum` of all frames
    comparisons: `paired.judged` and `advised`, of all questions together
    settings: `pareto` over the tuned settings;  costs, ratios: `questions.costs` and `questions.cost_ratios`
    curves, learning_rates: `ladder.learning_rate_curves` and `ladder.best_learning_rates`
    depth: `error_by_depth`;  recipes: `recommended`, with `yaml`, null where there is no space to make it from
    failed: label and reason;  missing: labels of planned trials without a row
    space: that of the sweep, where it is there
    """

    name: str
    rows: pd.DataFrame
    margin: Margin
    labels: dict[str, str]
    strata: dict[str, str]
    comparisons: pd.DataFrame
    settings: pd.DataFrame
    costs: pd.DataFrame
    ratios: pd.DataFrame
    curves: pd.DataFrame
    learning_rates: pd.DataFrame
    depth: pd.DataFrame
    recipes: pd.DataFrame
    failed: list[tuple[str, str]]
    missing: list[str]
    space: SearchSpace | None = None

    @property
    def search(self) -> SearchConfig:
        """What best means in the sweep."""
        return self.space.search if self.space else SearchConfig()

    def of(self, question: str) -> pd.DataFrame:
        """The comparisons of one question."""
        return self.comparisons[self.comparisons["question"] == question]


def make_report(
    name: str,
    rows: pd.DataFrame,
    units: pd.DataFrame,
    space: SearchSpace | None = None,
    margin: Margin | None = None,
) -> Report:
    """Answers everything that the rows can answer; of what they cannot, frames are empty.

    rows, units: of `load_results` and `load_units`, also of a sweep that is not finished, or of several put together
    space: that of the sweep, for recipes and for what is missing
    """
    margin, search = margin or Margin(), space.search if space else SearchConfig()
    frame = with_settings(rows, search.metric, search.mode)
    usable = tuned(frame, search.metric, search.mode)
    return Report(
        name=name,
        rows=rows,
        margin=margin,
        labels=setting_labels(frame),
        strata=stratum_words(finished(frame)),
        comparisons=advised(judged(questions.all_questions(usable, margin))),
        settings=pareto(usable),
        costs=questions.costs(usable),
        ratios=questions.cost_ratios(usable),
        curves=learning_rate_curves(frame, search.metric, search.mode),
        learning_rates=best_learning_rates(frame, search.metric, search.mode),
        depth=error_by_depth(usable, units),
        recipes=_with_yaml(recommended(usable, margin, search.metric), rows, space),
        failed=failures(records(rows[rows["status"] == "failed"])),
        missing=_missing(rows, space) if space else [],
        space=space,
    )


def report_of(
    path_or_name: str | Path, storage: str | Path | None = None, margin: Margin | None = None
) -> Report:
    """The report of a sweep by its name in the storage, or the path or URI of its folder. Raises UsageError."""
    from raysweep.errors import RaysweepError
    from raysweep.results.folders import SPACE_FILE, sweep_folder
    from raysweep.results.reader import load_results, load_units

    folder = sweep_folder(path_or_name, storage)
    try:
        space = SearchSpace.from_yaml(folder / SPACE_FILE)
    except RaysweepError:  # rows that were brought here without it
        space = None
    return make_report(folder.resolve().name, load_results(folder), load_units(folder), space, margin)


def _with_yaml(recipes: pd.DataFrame, rows: pd.DataFrame, space: SearchSpace | None) -> pd.DataFrame:
    by_id: dict[Any, dict[str, Any]] = {row["trial_id"]: row for row in records(rows)} if space else {}
    texts = [recipe_yaml(space, by_id[trial]) if space else None for trial in recipes["trial_id"]]
    return recipes.assign(yaml=pd.Series(texts, dtype=object, index=recipes.index))


def _missing(rows: pd.DataFrame, space: SearchSpace) -> list[str]:
    """By label, in the order of the space; those of an Optuna search are not known beforehand."""
    planned = pd.DataFrame([planned_columns(one) for one in space.expand()], dtype=object)
    there, labels = set(keys_of(rows, PLANNED_COLUMNS)), trial_labels(planned)
    keys = keys_of(planned, PLANNED_COLUMNS)
    return [label for key, label in zip(keys, labels, strict=True) if key not in there]
