"""What a trial found out, and the columns and rows that follow from it. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raysweep.errors import NumericalError
from raysweep.reconstruction.measures import CALIBRATION, KEPT_TEXTS, BatchMeasures, ratio
from raysweep.shards.group_info import TextInfo

PHASES = ("statistics", "mask", "recovery", "evaluation")


@dataclass
class Quality:
    """What evaluation found: perplexities by text, output errors of the last block, and of every block."""

    perplexities: dict[str, float] = field(default_factory=dict)
    block_errors: dict[str, dict[int, float]] = field(default_factory=dict)
    zeros: int = 0

    def output_error(self, text: str) -> float | None:
        """Of the last block's output, the whole model's."""
        errors = self.block_errors.get(text)
        return errors[max(errors)] if errors else None


Finished = list[dict[str, Any]]
"""What every shard says of the work under a name."""


@dataclass(frozen=True)
class Evaluated:
    """A model evaluated once for all trials that need it: rows of its linears, its quality, what its shards say."""

    linear_rows: list[dict[str, Any]]
    quality: Quality
    finished: Finished


@dataclass
class Outcome:
    """All that a trial found out: columns of its row, and the rows of its units.

    kept: whether its weights were written to where kept trials lie;  not_kept: why they were not, though wanted there
    """

    columns: dict[str, Any]
    units: list[dict[str, Any]]
    kept: bool = False
    not_kept: str | None = None


@dataclass(frozen=True)
class Rung:
    """How good a trial is while a part of the model is pruned and recovered, and the rest still dense.

    number: of the rung, from 0;  fraction: of the model's blocks, above 0 and below 1
    value: of the metric;  cost: columns of a row, up to here
    """

    number: int
    fraction: float
    value: float | None
    cost: dict[str, Any]


def as_shared(finished: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same work, done by another trial: nothing of this trial's own, all of it standalone."""
    return [
        shard | {"seconds": {phase: (0.0, standalone) for phase, (_, standalone) in shard["seconds"].items()}}
        for shard in finished
    ]


def phase_seconds(finished: Iterable[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    own, standalone = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
    for shard in finished:
        for phase, (seconds, alone) in shard["seconds"].items():
            own[phase] += seconds
            standalone[phase] += alone
    return own, standalone


def quality_of(
    batches: Sequence[BatchMeasures], finished: Finished, texts: Mapping[str, TextInfo]
) -> Quality:
    """What batches, which may lack the errors of blocks, and shards make together. Raises NumericalError."""
    by_text: dict[str, list[BatchMeasures]] = {}
    for batch in batches:
        by_text.setdefault(batch.text, []).append(batch)
    losses = {text: [loss for batch in found for loss in batch.losses] for text, found in by_text.items()}
    return Quality(
        {text: perplexity(losses[text], texts[text]) for text in by_text if text != CALIBRATION},
        {text: _block_errors(by_text[text], text, finished) for text in KEPT_TEXTS if text in by_text},
        sum(int(shard["weight_zeros"]) for shard in finished),
    )


def _block_errors(batches: Sequence[BatchMeasures], text: str, finished: Finished) -> dict[int, float]:
    powers: dict[int, float] = {}
    for shard in finished:
        powers |= shard["target_powers"][text]
    return {
        index: ratio([error for batch in batches for error in batch.errors[index]], [powers[index]])
        for index in sorted(batches[0].errors)
    }


def evaluation_cost(batches: Iterable[BatchMeasures]) -> dict[str, Any]:
    """What batches took, beside what shards say of the rest: nothing of it is shared or kept."""
    seconds = math.fsum(batch.seconds for batch in batches)
    return {"seconds": {"evaluation": (seconds, seconds)}, "dense_seconds": 0.0}


def perplexity(losses: list[float], text: TextInfo) -> float:
    """exp of the mean next-token loss over tokens - 1 targets a window; the sum is exact, in whatever order."""
    mean = math.fsum(losses) / (text.samples * (text.tokens - 1))
    if not math.isfinite(mean) or mean > 700:  # exp would overflow
        raise NumericalError(
            f"the mean next-token loss on {text.name} is {mean}: the model gives no probabilities"
        )
    return math.exp(mean)


def fallbacks_of(rows: Iterable[Mapping[str, Any]]) -> int:
    return sum(row.get("fallback") is not None for row in rows)


def unit_columns(units: list[dict[str, Any]]) -> dict[str, Any]:
    """Raises NumericalError where there is none: too few tokens are routed to all experts that are pruned."""
    if not units:
        raise NumericalError("nothing that is pruned could be recovered: no expert of it has enough tokens")
    return {
        f"unit_error_{when}": math.fsum(unit[f"error_{when}"] for unit in units) / len(units)
        for when in ("before", "after")
    }


def unit_row(unit: dict[str, Any]) -> dict[str, Any]:
    cost = ("training_flops", "trainable_parameters", "peak_bytes")
    row = {name: value for name, value in unit.items() if name not in cost}
    return {"kind": "unit", **row}


def block_rows(quality: Quality) -> list[dict[str, Any]]:
    return [
        {"kind": "block", "unit": str(index), "block": index, "error_after": error}
        for index, error in sorted(quality.block_errors.get(CALIBRATION, {}).items())
    ]
