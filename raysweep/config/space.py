"""A search space: read from YAML or a dictionary, checked as a whole, and expanded into planned trials."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from raysweep.config.calibration import CalibrationConfig
from raysweep.config.dialect import dump_yaml
from raysweep.config.document import Document, from_data
from raysweep.config.expansion import Axes, Group, PlannedTrial, Sampled, group_points, points
from raysweep.config.sections import (
    EvaluationConfig,
    ExecutionConfig,
    ModelConfig,
    PerplexityConfig,
    SearchConfig,
    ValidationConfig,
)
from raysweep.config.studies import Study, open_fields, studies_of
from raysweep.config.trial import Trial
from raysweep.config.validation import check_name, relocated
from raysweep.errors import UsageError

__all__ = [
    "CalibrationConfig",
    "EvaluationConfig",
    "ExecutionConfig",
    "ModelConfig",
    "PerplexityConfig",
    "PlannedTrial",
    "SearchConfig",
    "SearchSpace",
    "Trial",
    "ValidationConfig",
]


@dataclass(frozen=True)
class SearchSpace:
    """A checked search space. Make one with `from_yaml`, `from_text` or `from_dict`, which check everything.

    model_axes, calibration_axes: for each field of the section its values (one, or several of an axis)
    groups: for each group of the sweep, and each field in it, its values or how they are drawn
    document: what it was read from, for the places of what proves wrong later
    """

    name: str
    model_axes: Axes
    calibration_axes: Axes
    validation: ValidationConfig
    evaluation: EvaluationConfig
    groups: tuple[Group, ...]
    search: SearchConfig
    execution: ExecutionConfig
    document: Document = field(compare=False, repr=False)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> SearchSpace:
        """Reads a file; `overrides` are KEY=VALUE texts as of `--set`. Raises UsageError."""
        return cls._of(Document.read(Path(path)), overrides)

    @classmethod
    def from_text(cls, text: str, overrides: Iterable[str] = (), source: str = "search space") -> SearchSpace:
        """As `from_yaml`, of YAML in memory; `source` names it in errors."""
        return cls._of(Document.parse(text, source), overrides)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], overrides: Iterable[str] = ()) -> SearchSpace:
        """As `from_yaml`, of the same structure made in Python."""
        return cls._of(from_data(data), overrides)

    @classmethod
    def _of(cls, document: Document, overrides: Iterable[str]) -> SearchSpace:
        from raysweep.config.building import build_space  # it builds this class, so it cannot come first

        document.override(overrides)
        return build_space(document)

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """The distinct models, in the order in which they run."""
        return tuple(dict.fromkeys(ModelConfig.model_validate(point) for point in points(self.model_axes)))

    @property
    def calibrations(self) -> tuple[CalibrationConfig, ...]:
        """The distinct calibration sets, in the order in which they run."""
        made = (CalibrationConfig.model_validate(point) for point in points(self.calibration_axes))
        return tuple(dict.fromkeys(made))

    def expand(self) -> list[PlannedTrial]:
        """Every distinct trial that is known before the sweep runs: model by model, its dense one first, then by
        calibration set. Those that studies will choose are not."""
        return list(self._planned)

    def studies(self) -> list[Study]:
        """The studies of the space; none unless the algorithm is optuna."""
        return studies_of(self)

    def typical(self) -> list[PlannedTrial]:
        """As many trials as the sweep has, those of studies as they may come out."""
        examples = [corner for study in self.studies() for corner in [next(study.corners())] * study.samples]
        return self.expand() + examples

    @cached_property
    def _planned(self) -> tuple[PlannedTrial, ...]:
        planned: list[PlannedTrial] = []
        for model in self.models:
            planned.append(PlannedTrial(model, None, Trial.dense()))
            for calibration in self.calibrations:
                planned += [
                    PlannedTrial(model, calibration, trial) for trial in self._trials(calibration.seed)
                ]
        return tuple(planned)

    def _trials(self, default_seed: int) -> dict[Trial, None]:
        """The distinct trials of one calibration set, in the order of the file."""
        return dict.fromkeys(
            trial
            for index, group in enumerate(self.groups)
            if not (self.search.algorithm == "optuna" and open_fields(group, self.search.compare_within))
            for trial in self._group_trials(index, default_seed)
        )

    def _group_trials(self, index: int, default_seed: int) -> Iterator[Trial]:
        points_of = group_points(self.groups[index], index, self.search.num_samples or 1, self.search.seed)
        return (Trial.model_validate(with_seed(point, default_seed)) for point in points_of)

    def placed(self, error: UsageError, path: tuple[str | int, ...]) -> UsageError:
        """What is wrong with a part of the space, with its file and line."""
        return relocated(error, self.document, path)

    def refusal(self, planned: PlannedTrial, error: UsageError) -> UsageError:
        """What is wrong with a trial (`where` is the field) with file and line of the first group that asks for it."""
        seed = planned.calibration.seed if planned.calibration else 0
        for index in range(len(self.groups)):
            alone = replace(self, groups=(self.groups[index],))
            corners = (corner.trial for study in studies_of(alone) for corner in study.corners())
            if planned.trial in corners or planned.trial in self._group_trials(index, seed):
                return relocated(error, self.document, ("sweep", index))
        return error.inside("sweep: ")

    def evaluation_protocol(self) -> dict[str, Any]:
        """How trials are measured, for their identity; the texts themselves enter it by their hashes."""
        protocol: dict[str, Any] = {"perplexity": [entry.protocol() for entry in self.evaluation.perplexity]}
        if self.validation.samples:
            protocol["validation"] = self.validation.protocol(self.evaluation.perplexity[0].sequence_length)
        if self.tasks_of_all:
            protocol["tasks"] = list(self.tasks_of_all)
        return protocol

    @property
    def tasks_of_all(self) -> tuple[str, ...]:
        """The tasks that every trial is measured on, which belong to its identity. Those of kept trials alone do not:
        they can be measured at any later time, and change no other column."""
        return self.evaluation.tasks if self.evaluation.tasks_on == "all" else ()

    def with_name(self, name: str) -> SearchSpace:
        """The same space under another name (`--name`)."""
        return replace(self, name=check_name(name, "--name"))

    def to_dict(self) -> dict[str, Any]:
        """Everything, defaults filled in; `from_dict` gives an equal space."""
        return {
            "name": self.name,
            "model": _plain_axes(self.model_axes),
            "calibration": _plain_axes(self.calibration_axes),
            "validation": self.validation.model_dump(mode="json"),
            "evaluation": self.evaluation.model_dump(mode="json"),
            "sweep": [_plain_axes(group) for group in self.groups],
            "search": self.search.model_dump(mode="json"),
            "execution": self.execution.model_dump(mode="json"),
        }

    def resolved_yaml(self) -> str:
        """`to_dict` as YAML: what is stored beside the results."""
        return dump_yaml(self.to_dict())


def with_seed(point: Mapping[str, Any], default_seed: int) -> dict[str, Any]:
    """A point of a group whose seed, if not given, is that of the calibration set."""
    return {**point, "seed": default_seed if point.get("seed") is None else point["seed"]}


def _plain_axes(axes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain_values(values) for name, values in axes.items()}


def _plain_values(values: tuple[Any, ...] | Sampled) -> Any:
    if isinstance(values, Sampled):
        return {values.kind: [_plain(value) for value in values.values]}
    return _plain(values[0]) if len(values) == 1 else [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """As YAML has it: names as a list, pairs and sections as a mapping."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if not isinstance(value, tuple):
        return value
    return dict(value) if value and isinstance(value[0], tuple) else list(value)
