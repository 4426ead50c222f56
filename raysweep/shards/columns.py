"""The columns of a trial's row, from what was measured and what it took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysweep.config.trial import Trial
from raysweep.reconstruction.measures import CALIBRATION, VALIDATION
from raysweep.shards.group_info import EVALUATION_PREFIX, GroupInfo
from raysweep.shards.outcome import PHASES, Finished, Quality, phase_seconds
from raysweep.shards.retrained import Retrained, StartCost

Columns = dict[str, Any]


def first_text(info: GroupInfo) -> str:
    """The evaluation entry that fills `perplexity`."""
    return next(text for text in info.texts if text.startswith(EVALUATION_PREFIX))


@dataclass(frozen=True)
class RowColumns:
    """Of trials that run through a group."""

    info: GroupInfo

    def quality(self, quality: Quality) -> Columns:
        columns: Columns = {"perplexity": quality.perplexities[first_text(self.info)]}
        for text, value in quality.perplexities.items():
            if text.startswith(EVALUATION_PREFIX):
                columns[f"perplexity_{text.removeprefix(EVALUATION_PREFIX)}"] = value
        for text in (CALIBRATION, VALIDATION):
            columns |= self.of_text(quality, text)
        columns["realized_sparsity"] = quality.zeros / sum(self.info.prunable.values())
        return columns

    def of_text(self, quality: Quality, text: str) -> Columns:
        """Of the calibration or the validation set alone."""
        columns: Columns = {f"output_error_{text}": quality.output_error(text)}
        if text == VALIDATION:
            columns["validation_perplexity"] = quality.perplexities.get(VALIDATION)
        return columns

    def cost(
        self, finished: Finished, units: Sequence[dict[str, Any]] = (), trial: Trial | None = None
    ) -> Columns:
        """units: rows of those that were recovered, of the trial"""
        own, standalone = phase_seconds(finished)
        used_statistics = bool(standalone["mask"])  # a dense trial prunes nothing and so needs no statistics
        dense_seconds = sum(shard["dense_seconds"] for shard in finished) if used_statistics else 0.0
        columns: Columns = {f"seconds_{phase}": own[phase] for phase in PHASES}
        columns["device_seconds"] = math.fsum(own.values())
        columns["device_seconds_standalone"] = math.fsum(standalone.values()) + dense_seconds
        columns["devices"] = self.info.shards
        if units and trial is not None:
            columns |= self._recovery(units, trial)
        return columns

    def peaks(self, finished: Finished) -> Columns:
        """finished: of the trial's own weights"""
        told = [shard["peaks"] for shard in finished if "peaks" in shard]
        if not told or None in told:
            return {}
        columns: Columns = {"peak_host_bytes": max(peaks["host"] for peaks in told) or None}
        if all(peaks["device"] is not None for peaks in told):
            columns["peak_device_bytes"] = max(peaks["device"] for peaks in told)
        return columns

    def retraining(
        self, measuring: Columns, trial: Trial, cost: Retrained, start: StartCost, tokens: int, name: str
    ) -> Columns:
        """With what the start weights took: standalone always, else on the account of the trial they were made for.

        measuring: `cost` of that alone;  tokens: of the text;  name: of the trial
        """
        own_start = start.seconds if start.owner == name else 0.0
        alone = measuring["device_seconds_standalone"] + cost.seconds + start.standalone
        return measuring | {
            "seconds_total": cost.start_seconds + cost.wall_seconds,  # the measuring comes on top
            "seconds_recovery": cost.seconds + own_start,
            "device_seconds": measuring["device_seconds"] + cost.seconds + own_start,
            "device_seconds_standalone": alone,
            "devices": cost.workers,
            "training_flops": float(cost.training_flops),
            "optimizer_steps": cost.steps,
            "tokens_unique": tokens,
            "tokens_trained": tokens * (trial.epochs or 0),
            "trainable_parameters": cost.trainable_parameters,
            "peak_recovery_bytes": cost.peak_bytes,
        }

    def _recovery(self, units: Sequence[dict[str, Any]], trial: Trial) -> Columns:
        text = self.info.texts[CALIBRATION]
        tokens = text.samples * text.tokens
        return {
            "training_flops": float(sum(unit["training_flops"] for unit in units)),
            "optimizer_steps": None if trial.epochs is None else max(unit["steps"] for unit in units),
            "tokens_unique": tokens,
            "tokens_trained": None if trial.epochs is None else tokens * trial.epochs,
            "trainable_parameters": sum(unit["trainable_parameters"] for unit in units),
            "peak_recovery_bytes": max(unit["peak_bytes"] for unit in units),
        }
