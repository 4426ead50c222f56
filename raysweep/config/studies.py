"""Searches that choose as they go: one study for each cell of a group, over what the group leaves open."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from raysweep.config.calibration import CalibrationConfig
from raysweep.config.expansion import Group, PlannedTrial, Sampled
from raysweep.config.fields import default_of, has_settled_default
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

    key: tells its rows from those of other studies: model, calibration set, fixed fields, names of the others, and
    which of equal ones
    number: its place in the sweep, from 0
    samples: most trials that it runs; fewer than asked for where its lists have no more
    excluded: trials that its lists also give and that it may not choose, since they are others' already
    """

    key: str
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
        candidates = {name: _candidates(values, getattr(trial, name)) for name, values in self.open.items()}
        for values in product(*candidates.values()):
            chosen = dict(zip(candidates, values, strict=True))
            try:
                if self.planned(chosen).trial == trial:
                    return chosen
            except UsageError:
                continue
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
    taken, keys = set(space.expand()), Counter[str]()
    for model, calibration in product(space.models, space.calibrations):
        for group in space.groups:
            is_open = open_fields(group, space.search.compare_within)
            axes = {name: _ends(values) for name, values in group.items() if name not in is_open}
            for point in product(*axes.values()) if is_open else ():
                fixed = dict(zip(axes, point, strict=True))
                cell = _digest(model, calibration, fixed, is_open)
                keys[cell] += 1
                key, samples = f"{cell}-{keys[cell]}", space.search.num_samples or 0
                study = Study(key, len(found), samples, model, calibration, fixed, is_open)
                if study.is_finite:
                    study = _sized(study, taken, found)
                    taken |= set(study.corners())
                found.append(study)
    return found


def _sized(study: Study, taken: set[PlannedTrial], earlier: Sequence[Study]) -> Study:
    """A study of lists without the trials that others have, and with no more samples than it has others."""
    corners = frozenset(study.corners())
    beside = [
        other
        for other in earlier
        if not other.is_finite and (other.model, other.calibration) == (study.model, study.calibration)
    ]
    drawn = {corner for corner in corners if any(other.chosen(corner.trial) for other in beside)}
    excluded = corners & taken | drawn
    return replace(study, samples=min(study.samples, len(corners - excluded)), excluded=excluded)


def _digest(
    model: ModelConfig, calibration: CalibrationConfig, fixed: Mapping[str, Any], is_open: Iterable[str]
) -> str:
    """Of what is not at its default, so that fields that come later change nothing."""
    infos = Trial.model_fields
    told = {
        name: repr(value)
        for name, value in fixed.items()
        if not (has_settled_default(infos[name]) and value == default_of(infos[name]))
    }
    settings = [sorted(each.model_dump(exclude_defaults=True).items()) for each in (model, calibration)]
    text = repr((settings, sorted(told.items()), sorted(is_open)))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def open_fields(group: Group, compare_within: tuple[str, ...]) -> dict[str, Open]:
    """The fields of a group that a search chooses: those that are drawn, and lists that make no cells."""
    return {
        name: values
        for name, values in group.items()
        if isinstance(values, Sampled) or (len(values) > 1 and name not in compare_within)
    }


def _candidates(values: Open, value: Any) -> tuple[Any, ...]:
    """What may have been chosen of a field that a trial holds as `value`: that, or where it says something else,
    because the field does not matter to the trial or is settled otherwise, any."""
    return (value,) if _holds(values, value) else _ends(values)


def _holds(values: Open, value: Any) -> bool:
    if isinstance(values, Sampled) and values.kind != "choice":
        return isinstance(value, float) and values.values[0] <= value <= values.values[1]
    return value in (values.values if isinstance(values, Sampled) else values)


def _ends(values: Open) -> tuple[Any, ...]:
    if isinstance(values, Sampled):
        return values.values if values.kind == "choice" else values.values[:1]
    return values
