"""A shard's worker, a plain class: holds a range of blocks and does what trials ask of them, one call at a time."""

# B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysweep.config.trial import Trial
from raysweep.model.evaluation import window_losses
from raysweep.model.loading import ModelSource
from raysweep.model.shard import ModelShard
from raysweep.reconstruction.activations import batches
from raysweep.reconstruction.knowledge import Stopwatch
from raysweep.reconstruction.range import KEPT_TEXTS, BlockRange, MaskRecipe
from raysweep.reconstruction.recovery import recover_unit, unit_names
from raysweep.shards.group_info import ShardSpec

Seconds = tuple[float, float]
"""Busy seconds of a trial: its own, and standalone (with what it shares computed again)."""

_INTEGER_VIEWS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}


class ShardWorker:
    """Knows no Ray. Hidden states come and go as arrays; everything else that moves is small.

    The constructor finds the shard's part of the model by its spec alone. `set_text` and `dense_pass` bring a
    calibration set; a trial is then `prune`d, `recover`ed unit by unit, passed `forward` batch by batch, `finish`ed
    and `release`d.
    """

    def __init__(self, spec: ShardSpec) -> None:
        if spec.device == "cpu":
            torch.set_num_threads(spec.threads)
        self.spec = spec
        source = ModelSource(spec.model_path, spec.revision, spec.trust_remote_code)
        self.shard = ModelShard.load(source, spec.start, spec.stop, spec.dtype, spec.device)
        self.blocks = BlockRange(self.shard, spec.knowledge_bytes)
        self._ids: dict[str, Tensor] = {}
        self._seconds: dict[str, dict[str, list[float]]] = defaultdict(
            lambda: defaultdict(lambda: [0.0, 0.0])
        )

    # What the group asks once

    def describe(self, granularities: list[str]) -> dict[str, Any]:
        """Facts about this worker: process, device, bytes read, and the units of its blocks."""
        return {
            "pid": os.getpid(),
            "host": platform.node(),
            "device_name": _device_name(self.shard.device),
            "bytes_read": self.shard.bytes_read,
            "units": {name: unit_names(self.blocks, name) for name in granularities},
        }

    def set_text(self, name: str, ids_ST: np.ndarray[Any, Any] | None) -> None:
        """Token ids of a text; None where only its activations pass by."""
        if ids_ST is not None:
            self._ids[name] = torch.from_numpy(np.array(ids_ST))

    def forget_texts(self, keep_halves: bool) -> None:
        """Before another calibration set. keep_halves: whether trials will need the boundary within a block."""
        self.blocks.forget_texts()
        self._seconds.clear()
        self.blocks.keep_halves = keep_halves

    def text_batches(self, samples: int, tokens: int) -> list[tuple[int, int]]:
        return [(rows.start, rows.stop) for rows in batches(samples, tokens, self.shard.device)]

    def dense_pass(
        self, text: str, samples: int, start: int, stop: int, hidden: Any, before: Any = None
    ) -> Any:
        """Passes a batch of a kept text through the dense blocks; returns hidden states for the next shard.

        before: the result of the batch before it at this shard. Statistics are sums, whose last bits depend on the
        order; a call that is handed this result cannot overtake it.
        """
        rows = slice(start, stop)
        hidden_BTH = self._incoming(text, rows, hidden)
        output_BTH = self.blocks.dense_pass(text, samples, rows, hidden_BTH)
        return None if self.shard.is_last else to_wire(output_BTH)

    # What a trial asks

    def prune(self, name: str, trial: Trial, index: int) -> list[dict[str, Any]]:
        """Masks one block for the trial; returns the rows of its linears."""
        with self._timed(name, "mask"):
            recipe, block = MaskRecipe.of(trial), self.blocks.blocks[index]
            self.blocks.prune(name, recipe, block)
            rows = self.blocks.linear_rows(recipe, block)
        return rows

    def recover(self, name: str, trial: Trial, unit: str) -> dict[str, Any]:
        """Reconstructs one unit of the trial; returns its row. Raises NumericalError when it diverges."""
        with self._timed(name, "recovery"):
            watch = Stopwatch(self.shard.device)
            row = recover_unit(self.blocks, name, trial, unit).as_dict()
            row["seconds"] = watch.seconds()
            row["peak_device_bytes"] = row["peak_bytes"] if self.shard.device.type == "cuda" else None
        return row

    def forward(self, name: str | None, text: str, start: int, stop: int, hidden: Any, cost_name: str) -> Any:
        """Passes a batch through the blocks with the weights of `name` (None: dense).

        Returns hidden states for the next shard; the last shard returns the summed next-token losses of every window,
        or None for a text that is only compared with the dense model's activations.
        """
        with self._timed(cost_name, "evaluation"):
            rows = slice(start, stop)
            hidden_BTH = self.blocks.forward(name, text, rows, self._incoming(text, rows, hidden))
            if not self.shard.is_last:
                return to_wire(hidden_BTH)
            return (
                None
                if text == KEPT_TEXTS[0]
                else window_losses(self.shard, hidden_BTH, self._ids[text][rows])
            )

    def finish(self, name: str) -> dict[str, Any]:
        """Output errors of the trial's blocks by text, and its busy seconds by phase on this shard."""
        errors = {
            text: self.blocks.block_errors(name, text) for text in KEPT_TEXTS if text in self.blocks.texts
        }
        return {
            "errors": errors,
            "seconds": {phase: tuple(pair) for phase, pair in self._seconds.get(name, {}).items()},
            "dense_seconds": self.blocks.dense_seconds,
            "weight_zeros": self._zeros(name),
        }

    def release(self, name: str) -> None:
        """Forgets the weights and figures under `name` and under names that end in `@name`, of models that the trial
        evaluated for others. Releasing twice does no harm."""
        known = {*self.blocks.weights, *self._seconds}
        for each in {name, *(other for other in known if other.endswith(f"@{name}"))}:
            self.blocks.release(each)
            self.blocks.knowledge.close_account(each)
            self._seconds.pop(each, None)

    # Within

    def _incoming(self, text: str, rows: slice, hidden: Any) -> Tensor:
        if self.shard.is_first:
            return self.shard.embed(self._ids[text][rows])
        return from_wire(hidden, self.shard.dtype)

    def _zeros(self, name: str) -> int:
        """Zeros among the prunable weights of the trial."""
        weights = self.blocks.weights.get(name, {})
        linears = (linear for block in self.blocks.blocks.values() for linear in block.linears)
        tensors = (weights[f"{linear}.weight"] for linear in linears if f"{linear}.weight" in weights)
        return sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in tensors)

    @contextmanager
    def _timed(self, name: str, phase: str) -> Iterator[None]:
        saved, watch = self.blocks.knowledge.saved_seconds, Stopwatch(self.shard.device)
        with self.blocks.knowledge.charged_to(name):
            yield
        own = watch.seconds()
        pair = self._seconds[name][phase]
        pair[0] += own
        pair[1] += own + self.blocks.knowledge.saved_seconds - saved


def to_wire(hidden_BTH: Tensor) -> np.ndarray[Any, Any]:
    """Hidden states as an array that Ray moves without pickling; 16-bit floats as the integers of their bits."""
    hidden_BTH = hidden_BTH.detach().cpu().contiguous()
    return hidden_BTH.view(_INTEGER_VIEWS.get(hidden_BTH.dtype, hidden_BTH.dtype)).numpy()


def from_wire(array: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    """The tensor that `to_wire` sent, in storage of its own: what arrives may be read-only and oddly aligned."""
    tensor = torch.empty(array.shape, dtype=_INTEGER_VIEWS.get(dtype, dtype))
    np.copyto(tensor.numpy(), array)
    return tensor.view(dtype)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
