"""From axes, groups and draws to the list of distinct trials, in the order in which they run."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from raysweep.config.calibration import CalibrationConfig
from raysweep.config.sections import ModelConfig
from raysweep.config.trial import Trial

MAX_TRIALS = 100_000
DRAW_DIGITS = 6  # drawn values are rounded, so that they are equal on every machine and can be read

Axes = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Sampled:
    """A field whose values are drawn: (log)uniform from (low, high), choice from its values."""

    kind: str
    values: tuple[Any, ...]

    def draw(self, key: str) -> Any:
        """The value that belongs to `key`, the same on every machine."""
        position = random.Random(key).random()
        if self.kind == "choice":
            return self.values[int(position * len(self.values))]
        low, high = self.values
        if self.kind == "loguniform":
            value = math.exp(math.log(low) + position * (math.log(high) - math.log(low)))
        else:
            value = low + position * (high - low)
        return min(max(float(f"{value:.{DRAW_DIGITS}g}"), low), high)


Group = Mapping[str, "tuple[Any, ...] | Sampled"]


@dataclass(frozen=True)
class PlannedTrial:
    """A trial with the model and the calibration set that it runs on (None for the dense trial)."""

    model: ModelConfig
    calibration: CalibrationConfig | None
    trial: Trial


def points(axes: Axes) -> Iterator[dict[str, Any]]:
    """Every combination; the last axis changes fastest."""
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def count_points(axes: Axes) -> int:
    return math.prod(len(values) for values in axes.values())


def group_points(group: Group, index: int, draws: int, seed: int) -> Iterator[dict[str, Any]]:
    """The combinations of one group: its listed axes, each with every draw.

    Draw k of a field depends on (seed, group, k, field) only. So more draws keep the earlier ones, and the
    points of the listed axes are compared at the same drawn values.
    """
    axes = {name: values for name, values in group.items() if not isinstance(values, Sampled)}
    sampled = {name: values for name, values in group.items() if isinstance(values, Sampled)}
    for point in points(axes):
        for k in range(draws if sampled else 1):
            drawn = {name: field.draw(f"{seed}/{index}/{k}/{name}") for name, field in sampled.items()}
            yield {name: drawn[name] if name in drawn else point[name] for name in group}


def count_group_points(group: Group, draws: int) -> int:
    axes = {name: values for name, values in group.items() if not isinstance(values, Sampled)}
    return count_points(axes) * (draws if len(axes) < len(group) else 1)
