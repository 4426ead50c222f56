"""What recovery finds out about a unit and evaluation about a batch, as plain numbers. No torch, so that trials can
hold them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from raysweep.errors import NumericalError

CALIBRATION, VALIDATION = "calibration", "validation"
KEPT_TEXTS = (CALIBRATION, VALIDATION)


def ratio(errors: Iterable[float], targets: Iterable[float]) -> float:
    """Sum of squared errors over sum of squared targets; exact sums, so that the order does not matter."""
    power = math.fsum(targets)
    error = math.fsum(errors)
    return error / power if power > 0 else (0.0 if error == 0 else math.inf)


@dataclass(frozen=True)
class TextError:
    """How far a unit's output over a text is from its target.

    errors, targets, losses: sums of squared errors, of squared targets and of the trial's loss, float64, by sample or
    all in one
    elements: what the sum of the losses is divided by
    """

    errors: tuple[float, ...] = ()
    targets: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    elements: int = 0

    @property
    def loss(self) -> float:
        """The trial's loss over the text; none where nothing of it was routed to an expert."""
        return math.fsum(self.losses) / self.elements if self.elements else 0.0

    @property
    def relative(self) -> float:
        """Squared error over squared target."""
        return ratio(self.errors, self.targets)

    def __add__(self, other: TextError) -> TextError:
        """Of the samples of both."""
        return TextError(
            self.errors + other.errors,
            self.targets + other.targets,
            self.losses + other.losses,
            self.elements + other.elements,
        )


Errors = Mapping[str, TextError]
"""By text."""

BlockErrors = dict[int, list[float]]
"""By block, the squared error of its output against the dense one, sample by sample."""


@dataclass(frozen=True)
class BatchMeasures:
    """What the evaluation of one batch finds out on its way through the blocks.

    text, start, stop: samples of which text
    losses: by sample, next-token losses summed over its targets; none of a text that is only compared
    errors: of a text whose dense activations are kept
    seconds: that it took, over all shards
    """

    text: str
    start: int
    stop: int
    losses: list[float] = field(default_factory=list)
    errors: BlockErrors = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def place(self) -> tuple[str, int, int]:
        return self.text, self.start, self.stop

    def parts(self, batches: Iterable[tuple[int, int]]) -> Iterator[BatchMeasures]:
        """What was measured of several batches at once, batch by batch; `batches`: (start, stop) of the text's."""
        for start, stop in batches:
            if self.start <= start and stop <= self.stop:
                own = slice(start - self.start, stop - self.start)
                errors = {index: by_sample[own] for index, by_sample in self.errors.items()}
                share = (stop - start) / (self.stop - self.start)
                yield BatchMeasures(self.text, start, stop, self.losses[own], errors, share * self.seconds)

    def and_then(self, losses: list[float], errors: BlockErrors, seconds: float) -> BatchMeasures:
        """With what the next shard adds."""
        return replace(self, losses=losses, errors=self.errors | errors, seconds=self.seconds + seconds)


@dataclass(frozen=True)
class Cost:
    """What the recovery of a unit, or of its part in one range of blocks, took."""

    linears: tuple[str, ...]
    steps: int
    training_flops: int
    trainable_parameters: int
    peak_bytes: int
    fallback: str | None = None


@dataclass(frozen=True)
class UnitResult:
    """What recovery did to one unit. Losses are the trial's loss, errors relative squared errors."""

    unit: str
    block: int
    linears: str
    loss_before: float
    loss_after: float
    validation_loss_before: float | None
    validation_loss_after: float | None
    error_before: float
    error_after: float
    steps: int
    fallback: str | None
    training_flops: int
    trainable_parameters: int
    peak_bytes: int

    @classmethod
    def of(cls, unit: str, block: int, before: Errors, after: Errors, parts: Iterable[Cost]) -> UnitResult:
        """Of a unit in one or several parts. block: its first. Raises NumericalError when an error is not finite."""
        for when, errors in {"before": before, "after": after}.items():
            if not all(
                math.isfinite(error.loss) and math.isfinite(error.relative) for error in errors.values()
            ):
                raise NumericalError(f"the error of unit {unit} {when} recovery is not finite")
        costs = list(parts)
        return cls(
            unit=unit,
            block=block,
            linears=",".join(linear for cost in costs for linear in cost.linears),
            loss_before=before[CALIBRATION].loss,
            loss_after=after[CALIBRATION].loss,
            validation_loss_before=before[VALIDATION].loss if VALIDATION in before else None,
            validation_loss_after=after[VALIDATION].loss if VALIDATION in after else None,
            error_before=before[CALIBRATION].relative,
            error_after=after[CALIBRATION].relative,
            steps=costs[0].steps,
            fallback=costs[0].fallback,
            training_flops=sum(cost.training_flops for cost in costs),
            trainable_parameters=sum(cost.trainable_parameters for cost in costs),
            peak_bytes=max(cost.peak_bytes for cost in costs),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
