"""Searches that choose as they go: one study for each cell of a group, over what the group leaves open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from raysweep.config.calibration import CalibrationConfig
from raysweep.config.expansion import Group, PlannedTrial, Sampled
from raysweep.config.sections import ModelConfig
from raysweep.config.trial import Trial
from raysweep.errors import UsageError

if TYPE_CHECKING:
    from raysweep.config.space import SearchSpace

Open = tuple[Any, ...] | Sampled
"""The values that a field may take: a list, or what it is drawn from."""


@dataclass(frozen=True)
class Study:
    """fixed: the fields of the group whose values are the cell's;  open: those that the search chooses

    number: its place in the sweep, from 0
    samples: most trials that it runs; fewer than asked for where its lists have no more
    excluded: trials that its lists also give and that it may not choose, since they are others' already
    """

    number: int
    samples: int
    model: ModelConfig
    calibration: CalibrationConfig
    fixed: Mapping[str, Any]
    open: Mapping[str, Open]
    excluded: frozenset[PlannedTrial] = frozenset()

    def planned(self, chosen: Mapping[str, Any]) -> PlannedTrial:
        """The trial with these values of the open fields. Raises UsageError for an impossible combination."""
        fields = {**self.fixed, **chosen}
        if fields.get("seed") is None:
            fields["seed"] = self.calibration.seed
        return PlannedTrial(self.model, self.calibration, Trial.model_validate(fields))

    def chosen(self, trial: Trial) -> dict[str, Any] | None:
        """The values of the open fields that give this trial; None where it is not one of the study's."""
        values = {name: _or_first(values, getattr(trial, name)) for name, values in self.open.items()}
        if not all(_holds(self.open[name], value) for name, value in values.items()):
            return None
        try:
            return values if self.planned(values).trial == trial else None
        except UsageError:
            return None

    @property
    def is_finite(self) -> bool:
        """Whether nothing is drawn from an interval, so that the corners are all its trials."""
        return not any(
            isinstance(values, Sampled) and values.kind != "choice" for values in self.open.values()
        )

    def corners(self) -> Iterator[PlannedTrial]:
        """A trial for every combination of listed values, at the first end of what is drawn from an interval."""
        for chosen in self.corner_values():
            yield self.planned(chosen)

    def corner_values(self) -> Iterator[dict[str, Any]]:
        """The values of the open fields at the corners."""
        choices = {name: _ends(values) for name, values in self.open.items()}
        for values in product(*choices.values()):
            yield dict(zip(choices, values, strict=True))


def studies_of(space: SearchSpace) -> list[Study]:
    """Every study of a space, model by model and calibration set by calibration set; none unless it is searched.

    A trial that is listed as well, or that an earlier study may choose, is none of a later one's samples.
    """
    if space.search.algorithm != "optuna":
        return []
    found: list[Study] = []
    taken = set(space.expand())
    for model, calibration in product(space.models, space.calibrations):
        for group in space.groups:
            is_open = open_fields(group, space.search.compare_within)
            cell = {name: _ends(values) for name, values in group.items() if name not in is_open}
            for point in product(*cell.values()) if is_open else ():
                fixed = dict(zip(cell, point, strict=True))
                study = Study(len(found), space.search.num_samples or 0, model, calibration, fixed, is_open)
                if study.is_finite:
                    corners = frozenset(study.corners())
                    samples = min(study.samples, len(corners - taken))
                    study = replace(study, samples=samples, excluded=corners & taken)
                    taken |= corners
                found.append(study)
    return found


def open_fields(group: Group, compare_within: tuple[str, ...]) -> dict[str, Open]:
    """The fields of a group that a search chooses: those that are drawn, and lists that make no cells."""
    return {
        name: values
        for name, values in group.items()
        if isinstance(values, Sampled) or (len(values) > 1 and name not in compare_within)
    }


def _or_first(values: Open, value: Any) -> Any:
    """A field that does not matter to a trial is null there, whatever was chosen: its first value stands for all."""
    return _ends(values)[0] if value is None and None not in _ends(values) else value


def _holds(values: Open, value: Any) -> bool:
    if isinstance(values, Sampled) and values.kind != "choice":
        return isinstance(value, float) and values.values[0] <= value <= values.values[1]
    return value in (values.values if isinstance(values, Sampled) else values)


def _ends(values: Open) -> tuple[Any, ...]:
    if isinstance(values, Sampled):
        return values.values if values.kind == "choice" else values.values[:1]
    return values
