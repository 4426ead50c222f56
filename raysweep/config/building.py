"""Builds a search space of a document, and refuses what is wrong in it with its place."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel

from raysweep.config.calibration import CalibrationConfig
from raysweep.config.document import Document, KeyPath
from raysweep.config.expansion import (
    MAX_TRIALS,
    Axes,
    Sampled,
    count_group_points,
    count_points,
    group_points,
    points,
)
from raysweep.config.fields import default_of, is_required
from raysweep.config.groups import axis_values, read_groups
from raysweep.config.sections import (
    BUILTIN_PREFIX,
    VALIDATION_METRICS,
    EvaluationConfig,
    ExecutionConfig,
    ModelConfig,
    PerplexityConfig,
    SearchConfig,
    ValidationConfig,
)
from raysweep.config.space import SearchSpace, with_seed
from raysweep.config.studies import open_fields
from raysweep.config.trial import Trial
from raysweep.config.validation import (
    assembled,
    check_name,
    checked_value,
    expect_mapping,
    missing_key,
    shown,
    validated,
)
from raysweep.errors import UsageError

M = TypeVar("M", bound=BaseModel)

SECTIONS = ("name", "model", "calibration", "validation", "evaluation", "sweep", "search", "execution")
BUILTIN_WINDOWS = 64  # of the default evaluation: seconds on a small CPU


def build_space(document: Document) -> SearchSpace:
    """The checked search space; raises UsageError."""
    root = expect_mapping(document, document.data, (), list(SECTIONS))
    for key in ("name", "model", "calibration", "sweep"):
        if root.get(key) is None:
            raise _missing_section(key, document)
    search = _section(SearchConfig, document, root, "search")
    calibration = _axes(CalibrationConfig, document, root, "calibration")
    space = SearchSpace(
        name=check_name(root["name"], document.where(("name",))),
        model_axes=_axes(ModelConfig, document, root, "model"),
        calibration_axes=calibration,
        validation=_section(ValidationConfig, document, root, "validation"),
        evaluation=_evaluation(document, root, calibration),
        groups=read_groups(document, root["sweep"], search),
        search=search,
        execution=_section(ExecutionConfig, document, root, "execution"),
        document=document,
    )
    _check_metric(space, document)
    _check_cells(space, document)
    _check_retraining(space, document)
    _check_size(space, document)
    _check_combinations(space, document)
    return space


def _missing_section(key: str, document: Document) -> UsageError:
    allowed = {
        "name": "text: the name of the sweep and of its folder",
        "model": "keys: " + ", ".join(ModelConfig.model_fields),
        "calibration": "keys: " + ", ".join(CalibrationConfig.model_fields),
        "sweep": "a list of groups, such as [{recovery: none, criterion: wanda, sparsity: 0.5}]",
    }
    what = "no trial at all: 'sweep' is missing" if key == "sweep" else f"key {key!r} is missing"
    return UsageError(what, where=document.where((key,)), allowed=allowed[key])


def _section(cls: type[M], document: Document, root: dict[str, Any], key: str) -> M:
    data = root.get(key)
    return validated(cls, {} if data is None else data, document, (key,))


def _axes(cls: type[BaseModel], document: Document, root: dict[str, Any], key: str) -> Axes:
    """A section whose scalars may be lists, with defaults filled in."""
    data = expect_mapping(document, root[key], (key,), list(cls.model_fields))
    axes: dict[str, tuple[Any, ...]] = {}
    for name, info in cls.model_fields.items():
        if name in data:
            axes[name] = axis_values(cls, name, data[name], document, (key, name))
        elif is_required(info):
            raise missing_key(cls, name, document, (key,))
        else:
            axes[name] = (default_of(info),)
    given = [name for name in data if name in axes]
    return {name: axes[name] for name in [*given, *(n for n in axes if n not in given)]}


def _evaluation(document: Document, root: dict[str, Any], calibration: Axes) -> EvaluationConfig:
    known = list(EvaluationConfig.model_fields)
    section = expect_mapping(document, root.get("evaluation") or {}, ("evaluation",), known)
    others = {
        name: checked_value(EvaluationConfig, name, value, document, ("evaluation", name))
        for name, value in section.items()
        if name != "perplexity"
    }
    perplexity = _perplexity_entries(document, section.get("perplexity"), calibration)
    return assembled(EvaluationConfig, {"perplexity": perplexity} | others, document, ("evaluation",))


def _perplexity_entries(document: Document, entries: Any, calibration: Axes) -> tuple[PerplexityConfig, ...]:
    path: KeyPath = ("evaluation", "perplexity")
    if entries is None:
        return (_builtin_evaluation(document, calibration),)
    if not isinstance(entries, list) or not entries:
        what = "perplexity is an empty list" if entries == [] else f"perplexity cannot be {shown(entries)}"
        allowed = "a list with at least one entry, such as [{name: NAME, dataset: ..., sequence_length: ...}]"
        raise UsageError(what, where=document.where(path), allowed=allowed)
    made = [validated(PerplexityConfig, entry, document, (*path, i)) for i, entry in enumerate(entries)]
    names = [entry.name for entry in made]
    for index, name in enumerate(names):
        if name in names[:index]:
            where = document.where((*path, index, "name"))
            raise UsageError(
                f"name {name!r} is used twice", where=where, allowed="a name of its own for every entry"
            )
    return tuple(made)


def _builtin_evaluation(document: Document, calibration: Axes) -> PerplexityConfig:
    """What is measured when nothing is said: only a builtin text is known to have a test split."""
    dataset = str(calibration["dataset"][0])
    if not dataset.startswith(BUILTIN_PREFIX):
        raise UsageError(
            "nothing to evaluate: evaluation.perplexity is missing",
            where=document.where(("evaluation", "perplexity")),
            allowed="a list of entries; it may be left out with a builtin calibration data set only",
            remedy=f"for example: evaluation: {{perplexity: [{{name: test, dataset: {dataset}, split: test, "
            f"sequence_length: {calibration['sequence_length'][0]}}}]}}",
        )
    return PerplexityConfig(
        name=check_name(dataset.removeprefix(BUILTIN_PREFIX), document.where(("calibration", "dataset"))),
        dataset=dataset,
        sequence_length=calibration["sequence_length"][0],
        max_windows=BUILTIN_WINDOWS,
    )


def _check_metric(space: SearchSpace, document: Document) -> None:
    if space.validation.samples == 0 and space.search.metric in VALIDATION_METRICS:
        raise UsageError(
            f"search.metric is {space.search.metric!r}, but validation.samples is 0",
            where=document.where(("search", "metric")),
            allowed="output_error_calibration, or validation.samples above 0",
        )


def _check_cells(space: SearchSpace, document: Document) -> None:
    """What is drawn cannot tell cells apart: a study would compare what may not be, a bracket would hold one trial."""
    if space.search.algorithm != "optuna" and space.search.scheduler == "none":
        return
    for index, group in enumerate(space.groups):
        for name, values in group.items():
            if isinstance(values, Sampled) and name in space.search.compare_within:
                raise UsageError(
                    f"{name} is drawn, and trials are compared only where it is equal (search.compare_within)",
                    where=document.where(("sweep", index, name)),
                    allowed="a value or a list",
                    remedy=f"or take {name} out of search.compare_within",
                )


def _check_retraining(space: SearchSpace, document: Document) -> None:
    """Retraining has a phase of its own, in which nothing can be stopped or chosen by rows that come later."""
    for index, group in enumerate(space.groups):
        recovery = group["recovery"]
        values = recovery.values if isinstance(recovery, Sampled) else recovery
        if "retrain" not in values:
            continue
        searched = space.search.algorithm == "optuna" and open_fields(group, space.search.compare_within)
        if searched or space.search.scheduler != "none":
            raise UsageError(
                "retraining cannot be chosen by a study or stopped by a scheduler",
                where=document.where(("sweep", index, "recovery")),
                allowed="search: {algorithm: grid or random, scheduler: none}",
                remedy="put what is retrained into a sweep of its own",
            )


def _check_size(space: SearchSpace, document: Document) -> None:
    searched = space.search.algorithm == "optuna"
    draws = 1 if searched else space.search.num_samples or 1
    per_set = sum(count_group_points(group, draws) for group in space.groups)
    per_set = max(per_set, (space.search.num_samples or 0) * searched)
    total = count_points(space.model_axes) * (1 + count_points(space.calibration_axes) * per_set)
    if total > MAX_TRIALS:
        raise UsageError(
            f"the search space spans {total} combinations",
            where=document.where(("sweep",)),
            allowed=f"at most {MAX_TRIALS} in one sweep",
            remedy="shorten its lists, lower search.num_samples, or make several sweeps of it",
        )


def _check_combinations(space: SearchSpace, document: Document) -> None:
    """Every combination once, so that an impossible one is refused with its group's place."""
    for axes, cls, key in (
        (space.model_axes, ModelConfig, "model"),
        (space.calibration_axes, CalibrationConfig, "calibration"),
    ):
        for point in points(axes):
            assembled(cls, point, document, (key,))
    draws = (space.search.num_samples or 1) if space.search.algorithm == "random" else 1
    for index, group in enumerate(space.groups):
        for point in group_points(group, index, draws, space.search.seed):
            assembled(Trial, with_seed(point, 0), document, ("sweep", index))
