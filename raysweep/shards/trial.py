"""One trial through a shard group: masks, units, evaluation, release. The same over Ray and in process; no torch."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raysweep.config.trial import MASK_FIELDS, Trial
from raysweep.errors import NumericalError
from raysweep.fingerprint import fingerprint
from raysweep.shards.group_info import (
    CALIBRATION,
    EVALUATION_PREFIX,
    VALIDATION,
    GroupInfo,
    Ref,
    ShardGroup,
    TextInfo,
)

PHASES = ("statistics", "mask", "recovery", "evaluation")
CALLS_AHEAD = (
    2  # calls of one trial that wait at every shard: enough to keep it busy, few enough to interleave
)


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


@dataclass(frozen=True)
class Evaluated:
    """A model evaluated once for all trials that need it: rows of its linears, its quality, what its shards say."""

    linear_rows: list[dict[str, Any]]
    quality: Quality
    finished: list[dict[str, Any]]


@dataclass
class Outcome:
    """All that a trial found out: columns of its row, and the rows of its units."""

    columns: dict[str, Any]
    units: list[dict[str, Any]]


def run_trial(group: ShardGroup, trial: Trial, name: str, order: int) -> Outcome:
    """Runs one trial under a name that no other trial in flight has. `order`: lower goes first at every shard.

    Raises NumericalError when a mask, a unit or an evaluation gives numbers that are not finite.
    """
    started = time.monotonic()
    run = _Run(group, name, order)
    if trial.is_dense:
        outcome = run.dense()
    elif trial.recovery == "none":
        outcome = run.pruned_only(trial)
    else:
        outcome = run.reconstructed(trial)
    outcome.columns["seconds_total"] = time.monotonic() - started
    return outcome


DENSE_KEY = "dense"


def pruned_key(trial: Trial) -> str:
    """Equal for trials with equal masks: stands for the trial that only prunes."""
    return f"pruned-{fingerprint(_only_pruned(trial).identity())}"


def known_perplexity(info: GroupInfo, value: float) -> Evaluated:
    """A model whose perplexity is known from an earlier launch, as far as other trials need it."""
    return Evaluated([], Quality({_first_text(info): value}), [])


def _first_text(info: GroupInfo) -> str:
    return next(text for text in info.texts if text.startswith(EVALUATION_PREFIX))


def _only_pruned(trial: Trial) -> Trial:
    fields = {name: getattr(trial, name) for name in MASK_FIELDS if getattr(trial, name) is not None}
    return Trial(recovery="none", seed=trial.seed, **fields)


class _Run:
    def __init__(self, group: ShardGroup, name: str, order: int) -> None:
        self.group, self.name, self.order = group, name, order
        self.info: GroupInfo = group.info
        self._open: set[Ref] = set()  # calls whose results have not been taken

    # The kinds of trial

    def dense(self) -> Outcome:
        dense, own = self._shared_dense()
        columns = self._quality_columns(dense.quality)
        columns |= self._cost_columns(
            dense.finished if own else _as_shared(dense.finished), recovery_units=[]
        )
        columns |= {"dense_perplexity": self._first(dense.quality), "output_error_calibration": 0.0}
        if VALIDATION in self.info.texts:
            columns["output_error_validation"] = 0.0
        return Outcome(columns, [])

    def pruned_only(self, trial: Trial) -> Outcome:
        pruned, own = self._shared_pruned(trial)
        if isinstance(pruned, NumericalError):
            raise pruned
        columns = self._quality_columns(pruned.quality) | self._compared(pruned)
        columns |= self._cost_columns(
            pruned.finished if own else _as_shared(pruned.finished), recovery_units=[]
        )
        return Outcome(columns, self._placed([*pruned.linear_rows, *_block_rows(pruned.quality)]))

    def reconstructed(self, trial: Trial) -> Outcome:
        try:
            linear_rows = self._prune(self.name, trial)
            units = self._recover(trial)
            quality = self._evaluate(self.name, self.name, list(self.info.texts))
            finished = self._finish(self.name)
            quality.block_errors, quality.zeros = _errors(finished), _zeros(finished)
        finally:
            self._release(self.name)
        pruned, _ = self._shared_pruned(trial)
        columns = self._quality_columns(quality) | self._compared(pruned)
        columns |= _unit_columns(units) | self._cost_columns(finished, units)
        return Outcome(columns, self._placed([*map(_unit_row, units), *linear_rows, *_block_rows(quality)]))

    # Their parts

    def _shared_pruned(self, trial: Trial) -> tuple[Evaluated | NumericalError, bool]:
        """What every trial with this mask shares: its evaluation before recovery. And whether it was made here.

        A model that is too damaged to be evaluated is shared as the error, which a recovery may well mend.
        """
        only_pruned, name = _only_pruned(trial), f"{pruned_key(trial)}@{self.name}"
        made_here: list[bool] = []

        def make() -> Evaluated | NumericalError:
            made_here.append(True)
            try:
                linear_rows = self._prune(name, only_pruned)
                quality = self._evaluate(name, name, list(self.info.texts))
                finished = self._finish(name)
                quality.block_errors, quality.zeros = _errors(finished), _zeros(finished)
                return Evaluated(linear_rows, quality, finished)
            except NumericalError as error:
                return error
            finally:
                self._release(name)

        return self.group.share(pruned_key(trial), self.name, make), bool(made_here)

    def _shared_dense(self) -> tuple[Evaluated, bool]:
        """The dense model's perplexities, for all trials."""
        made_here: list[bool] = []
        name = f"{DENSE_KEY}@{self.name}"

        def make() -> Evaluated:
            made_here.append(True)
            try:
                texts = [text for text in self.info.texts if text != CALIBRATION]
                return Evaluated([], self._evaluate(None, name, texts), self._finish(name))
            finally:
                self._release(name)

        return self.group.share(DENSE_KEY, self.name, make), bool(made_here)

    def _prune(self, name: str, trial: Trial) -> list[dict[str, Any]]:
        calls = [
            [("prune", (name, trial, index), f"prune {index}") for index in range(start, stop)]
            for start, stop in self.info.ranges
        ]
        return [row for rows in self._interleaved(calls) for row in rows]

    def _recover(self, trial: Trial) -> list[dict[str, Any]]:
        calls = [
            [("recover", (self.name, trial, unit), f"reconstruct {unit}") for unit in units]
            for units in self.info.units[str(trial.granularity)]
        ]
        return self._interleaved(calls)

    def _interleaved(self, calls: list[list[tuple[str, tuple[Any, ...], str]]]) -> list[Any]:
        """Makes every shard's calls, in order at each, at all shards at once; results by shard and call."""
        waiting = [deque(enumerate(shard_calls)) for shard_calls in calls]
        results: dict[tuple[int, int], Any] = {}
        ahead: deque[tuple[int, int, Ref]] = deque()

        def send(shard: int) -> None:
            if waiting[shard]:
                number, (method, arguments, label) = waiting[shard].popleft()
                ahead.append((shard, number, self._submit(shard, method, *arguments, label=label)))

        for _ in range(CALLS_AHEAD):
            for shard in range(len(calls)):
                send(shard)
        while ahead:
            shard, number, ref = self._next_done(ahead)
            results[shard, number] = self._result(ref)
            send(shard)
        return [results[place] for place in sorted(results)]

    def _next_done(self, ahead: deque[tuple[int, int, Ref]]) -> tuple[int, int, Ref]:
        position = self.group.first_done([ref for _, _, ref in ahead])
        shard, number, ref = ahead[position]
        del ahead[position]
        return shard, number, ref

    def _evaluate(self, weights: str | None, cost_name: str, texts: list[str]) -> Quality:
        """Passes the texts through the chain, several batches at once; every shard works on another one."""
        losses: dict[str, list[float]] = {text: [] for text in texts}
        ahead: deque[tuple[str, list[Ref]]] = deque()
        limit = CALLS_AHEAD * self.info.shards
        for text in texts:
            for start, stop in self.info.texts[text].batches:
                chain: list[Ref] = [None]
                for shard in range(self.info.shards):
                    arguments = (weights, text, start, stop, chain[-1], cost_name)
                    label = f"evaluate {text}[{start}:{stop}]"
                    chain.append(self._submit(shard, "forward", *arguments, label=label))
                ahead.append((text, chain[1:]))
                if len(ahead) > limit:
                    self._collect(ahead, losses)
        while ahead:
            self._collect(ahead, losses)
        return Quality(
            {text: _perplexity(losses[text], self.info.texts[text]) for text in texts if text != CALIBRATION}
        )

    def _collect(self, ahead: deque[tuple[str, list[Ref]]], losses: dict[str, list[float]]) -> None:
        text, chain = ahead.popleft()
        losses[text] += self._result(chain[-1]) or []
        self._open.difference_update(chain)

    def _finish(self, name: str) -> list[dict[str, Any]]:
        refs = [self._submit(shard, "finish", name) for shard in range(self.info.shards)]
        return [self._result(ref) for ref in refs]

    def _release(self, name: str) -> None:
        """Forgets the weights under `name` everywhere, after every call that could still bring some."""
        self.group.settle(list(self._open))
        self._open.clear()
        refs = [self._submit(shard, "release", name) for shard in range(self.info.shards)]
        self.group.settle(refs)
        self._open.clear()

    def _submit(self, shard: int, method: str, *arguments: Any, label: str = "") -> Ref:
        label = f"{self.name}: {label or method}"
        ref = self.group.submit(shard, self.order, method, *arguments, label=label)
        self._open.add(ref)
        return ref

    def _result(self, ref: Ref) -> Any:
        result = self.group.result(ref)
        self._open.discard(ref)
        return result

    def _placed(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with the shard that holds their block."""
        ranges = enumerate(self.info.ranges)
        shard_of = {index: shard for shard, (start, stop) in ranges for index in range(start, stop)}
        return [row | {"shard": shard_of[row["block"]]} for row in rows]

    # Their columns

    def _first(self, quality: Quality) -> float:
        return quality.perplexities[_first_text(self.info)]

    def _compared(self, pruned: Evaluated | NumericalError) -> dict[str, Any]:
        dense, _ = self._shared_dense()
        before = None if isinstance(pruned, NumericalError) else self._first(pruned.quality)
        return {"dense_perplexity": self._first(dense.quality), "pruned_perplexity": before}

    def _quality_columns(self, quality: Quality) -> dict[str, Any]:
        columns: dict[str, Any] = {"perplexity": self._first(quality)}
        for text, value in quality.perplexities.items():
            if text.startswith(EVALUATION_PREFIX):
                columns[f"perplexity_{text.removeprefix(EVALUATION_PREFIX)}"] = value
        columns["validation_perplexity"] = quality.perplexities.get(VALIDATION)
        columns["output_error_calibration"] = quality.output_error(CALIBRATION)
        columns["output_error_validation"] = quality.output_error(VALIDATION)
        columns["realized_sparsity"] = quality.zeros / sum(self.info.prunable.values())
        return columns

    def _cost_columns(
        self, finished: list[dict[str, Any]], recovery_units: list[dict[str, Any]]
    ) -> dict[str, Any]:
        own, standalone = _phase_seconds(finished)
        used_statistics = bool(standalone["mask"])  # a dense trial prunes nothing and so needs no statistics
        dense_seconds = sum(shard["dense_seconds"] for shard in finished) if used_statistics else 0.0
        columns: dict[str, Any] = {f"seconds_{phase}": own[phase] for phase in PHASES}
        columns["device_seconds"] = math.fsum(own.values())
        columns["device_seconds_standalone"] = math.fsum(standalone.values()) + dense_seconds
        columns["devices"] = self.info.shards
        if recovery_units:
            columns |= self._recovery_cost(recovery_units)
        return columns

    def _recovery_cost(self, units: list[dict[str, Any]]) -> dict[str, Any]:
        text = self.info.texts[CALIBRATION]
        return {
            "training_flops": float(sum(unit["training_flops"] for unit in units)),
            "optimizer_steps": max(unit["steps"] for unit in units),
            "tokens_unique": text.samples * text.tokens,
            "trainable_parameters": sum(unit["trainable_parameters"] for unit in units),
            "peak_recovery_bytes": max(unit["peak_bytes"] for unit in units),
        }


def _as_shared(finished: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same work, done by another trial: nothing of this trial's own, all of it standalone."""
    return [
        shard | {"seconds": {phase: (0.0, standalone) for phase, (_, standalone) in shard["seconds"].items()}}
        for shard in finished
    ]


def _phase_seconds(finished: Iterable[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    own, standalone = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
    for shard in finished:
        for phase, (seconds, alone) in shard["seconds"].items():
            own[phase] += seconds
            standalone[phase] += alone
    return own, standalone


def _errors(finished: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    errors: dict[str, dict[int, float]] = {}
    for shard in finished:
        for text, by_block in shard["errors"].items():
            errors.setdefault(text, {}).update(by_block)
    return errors


def _zeros(finished: Iterable[Mapping[str, Any]]) -> int:
    return sum(int(shard["weight_zeros"]) for shard in finished)


def _perplexity(losses: list[float], text: TextInfo) -> float:
    """exp of the mean next-token loss over tokens - 1 targets a window; the sum is exact, in whatever order."""
    mean = math.fsum(losses) / (text.samples * (text.tokens - 1))
    if not math.isfinite(mean) or mean > 700:  # exp would overflow
        raise NumericalError(
            f"the mean next-token loss on {text.name} is {mean}: the model gives no probabilities"
        )
    return math.exp(mean)


def _unit_columns(units: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        f"unit_error_{when}": math.fsum(unit[f"error_{when}"] for unit in units) / len(units)
        for when in ("before", "after")
    }


def _unit_row(unit: dict[str, Any]) -> dict[str, Any]:
    cost = ("training_flops", "trainable_parameters", "peak_bytes")
    row = {name: value for name, value in unit.items() if name not in cost}
    return {"kind": "unit", **row}


def _block_rows(quality: Quality) -> list[dict[str, Any]]:
    return [
        {"kind": "block", "unit": str(index), "block": index, "error_after": error}
        for index, error in sorted(quality.block_errors.get(CALIBRATION, {}).items())
    ]
