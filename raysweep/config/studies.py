"""Searches that choose as they go: one study for each cell of a group, over what the group leaves open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from raysweep.config.expansion import Group, PlannedTrial, Sampled
from raysweep.config.sections import CalibrationConfig, ModelConfig
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
    """

    number: int
    model: ModelConfig
    calibration: CalibrationConfig
    fixed: Mapping[str, Any]
    open: Mapping[str, Open]

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

    def corners(self) -> Iterator[PlannedTrial]:
        """A trial for every combination of listed values, at the first end of what is drawn from an interval."""
        choices = {name: _ends(values) for name, values in self.open.items()}
        for values in product(*choices.values()):
            yield self.planned(dict(zip(choices, values, strict=True)))


def studies_of(space: SearchSpace) -> list[Study]:
    """Every study of a space, model by model and calibration set by calibration set; none unless it is searched."""
    if space.search.algorithm != "optuna":
        return []
    found: list[Study] = []
    for model, calibration in product(space.models, space.calibrations):
        for group in space.groups:
            is_open = open_fields(group, space.search.compare_within)
            cell = {name: _ends(values) for name, values in group.items() if name not in is_open}
            if is_open:
                found += [
                    Study(
                        len(found) + place, model, calibration, dict(zip(cell, point, strict=True)), is_open
                    )
                    for place, point in enumerate(product(*cell.values()))
                ]
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
