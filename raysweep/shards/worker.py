"""A shard's worker, a plain class: holds a range of blocks and does what trials ask of them, one call at a time."""

# B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysweep.config.trial import Trial
from raysweep.model.block_files import read_block, write_block
from raysweep.model.checkpoint import ModelSource
from raysweep.model.evaluation import window_losses
from raysweep.model.shard import ModelShard
from raysweep.pruning.criteria import OwnFunction
from raysweep.pruning.recipe import MaskRecipe
from raysweep.reconstruction.activations import batches, batches_of, sizes, together
from raysweep.reconstruction.device_peak import highest_peak, lately_highest, restart_peak
from raysweep.reconstruction.knowledge import Stopwatch
from raysweep.reconstruction.measures import CALIBRATION, KEPT_TEXTS, BatchMeasures, Cost
from raysweep.reconstruction.optimizer import clip_factor
from raysweep.reconstruction.part import UnitPart
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.recovery import find_unit, is_pruned, recover_unit, units_in, weights_of
from raysweep.results.folders import OUTSIDE, block_file, unit_file
from raysweep.shards.counts import Counts
from raysweep.shards.device_name import device_name
from raysweep.shards.group_info import ShardSpec, UnitSpan
from raysweep.shards.peaks import HostPeak, Peaks
from raysweep.shards.trial_peaks import TrialPeaks
from raysweep.shards.unfinished import UnfinishedUnits
from raysweep.shards.wire import AS_DENSE, from_wire, to_wire

Seconds = tuple[float, float]
"""Busy seconds of a trial: its own, and standalone (with what it shares computed again)."""


class ShardWorker:
    """Knows no Ray. Hidden states come and go as arrays; everything else that moves is small.

    The constructor finds the shard's part of the model by its spec alone. `set_text` and `dense_pass` bring a
    calibration set; a trial is then begun, `prune`d, `recover`ed unit by unit, passed `forward` batch by batch,
    `finish`ed and `release`d.
    """

    def __init__(self, spec: ShardSpec) -> None:
        if spec.device == "cpu":
            torch.set_num_threads(spec.threads)
        self.spec, self._host_peak = spec, HostPeak()
        self._trial_peaks = TrialPeaks(self._restart_peaks, self._lately_held)
        source = ModelSource(spec.model_path, spec.revision, spec.trust_remote_code)
        self.shard = ModelShard.load(
            source,
            spec.start,
            spec.stop,
            spec.dtype,
            spec.device,
            spec.head,
            waits=spec.placement.waits,
        )
        self.blocks = BlockRange(self.shard, spec.knowledge_bytes, spec.placement)
        self.blocks.compiles = spec.compiles
        self.counts = Counts()
        self._ids: dict[str, Tensor] = {}
        self._unfinished = UnfinishedUnits()
        self._parts: dict[str, UnitPart] = {}
        self._part_began: dict[str, float] = {}
        self._seconds: dict[str, dict[str, list[float]]] = defaultdict(
            lambda: defaultdict(lambda: [0.0, 0.0])
        )

    # What the group asks once

    def describe(self, granularities: list[str]) -> dict[str, Any]:
        """Facts about this worker: process, device, libraries, bytes read, and the units of its blocks."""
        import transformers

        return {
            "pid": os.getpid(),
            "host": platform.node(),
            "device_name": device_name(self.shard.device.type),
            "versions": {
                "torch_version": str(torch.__version__),  # a class of torch's own, which trials would import
                "transformers_version": transformers.__version__,
            },
            "bytes_read": self.shard.bytes_read,
            "has_head": self.shard.has_head,
            "units": {
                name: [UnitSpan(unit.name, unit.start, unit.stop) for unit in units_in(self.blocks, name)]
                for name in granularities
            },
        }

    def set_own_criteria(self, own_criteria: dict[str, OwnFunction | Path]) -> None:
        """Functions and paths of mask files that users bring along, by the text that names them."""
        self.blocks.pruner.own_criteria = own_criteria

    def set_text(self, name: str, ids_ST: np.ndarray[Any, Any] | None) -> None:
        """Token ids of a text; None where only its activations pass by."""
        if ids_ST is not None:
            self._ids[name] = torch.from_numpy(np.array(ids_ST))

    def forget_texts(self, keep_halves: bool, matrices: bool) -> None:
        """Before another calibration set. keep_halves: whether trials will need the boundary within a block
        matrices: whether they will recover matrices alone"""
        self.blocks.forget_texts()
        self._seconds.clear()
        self.blocks.keep_halves, self.blocks.matrices = keep_halves, matrices

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

    def enter_dense(self, text: str, samples: int, start: int, stop: int, hidden: Any) -> None:
        """Takes in a batch of a kept text, which then passes the blocks one by one."""
        rows = slice(start, stop)
        self.blocks.enter_dense(text, samples, rows, self._incoming(text, rows, hidden))

    def pass_block(self, text: str, index: int, before: Any = None) -> None:
        """Passes a kept text that has arrived at a block through it. before: as in `dense_pass`"""
        self.blocks.pass_block(text, index)

    def leave_dense(self, text: str, start: int, stop: int) -> Any:
        """A batch of a kept text that has passed all blocks, for the next shard."""
        return to_wire(self.blocks.dense_output(text, slice(start, stop)))

    # What a trial asks

    def begin(self, name: str) -> None:
        """From here on the worker knows the trial."""
        self._trial_peaks.enter(name)
        self.blocks.begin(name)

    def prune(self, name: str, trial: Trial, index: int) -> list[dict[str, Any]]:
        """Prunes one block for the trial; returns the rows of its linears."""
        with self._timed(name, "mask"):
            block = self.blocks.blocks[index]
            self.blocks.prune(name, MaskRecipe.of(trial), block)
            return self.blocks.linear_rows(name, block)

    def recover(
        self, name: str, trial: Trial, unit: str, unfinished: Path | None = None
    ) -> dict[str, Any] | None:
        """Recovers one unit of the trial that lies here as a whole; returns its row, None where nothing was pruned.

        unfinished: a folder of the trial's own, with the units of it that an earlier launch or shard has recovered;
        this one joins them if it took longer than writing it will
        Blocks of it that are not pruned yet are pruned before, but for masks that come from what is recovered.
        Raises NumericalError when it diverges.
        """
        self._prune_first(name, trial, unit)
        with self._timed(name, "recovery"):
            if (
                unfinished is not None
                and (row := self._taken_over(name, trial, unit, unfinished)) is not None
            ):
                return row
            watch, before = Stopwatch(self.shard.device), set(self.blocks.weights[name])
            saved = self.blocks.knowledge.saved_seconds
            result = recover_unit(self.blocks, name, trial, unit)
            if result is None:
                return None
            self._count_unit(trial)
            row = result.as_dict() | {"seconds": watch.seconds()}
            row["peak_device_bytes"] = row["peak_bytes"] if self.shard.device.type == "cuda" else None
        if unfinished is not None:
            weights = weights_of(self.blocks, name, trial, unit, before)
            standalone = row["seconds"] + self.blocks.knowledge.saved_seconds - saved
            about = {"row": row, "standalone": standalone}
            self._unfinished.leave(name, unit_file(unfinished, unit), weights, about, row["seconds"])
        return row

    def _prune_first(self, name: str, trial: Trial, unit: str) -> None:
        if trial.statistics_stream == "recovered":
            return
        pruned = self.blocks.layers[name]
        for block in find_unit(self.blocks, str(trial.granularity), unit).blocks:
            if not any(linear in pruned for linear in block.linears):
                with self._timed(name, "mask"):
                    self.blocks.prune(name, MaskRecipe.of(trial), block)
                    self.blocks.linear_rows(name, block)

    def _taken_over(self, name: str, trial: Trial, unit: str, folder: Path) -> dict[str, Any] | None:
        """The row of a unit that was recovered before, whose weights become the trial's; its seconds count again."""
        blocks = find_unit(self.blocks, str(trial.granularity), unit).blocks
        found = self._unfinished.take(folder, unit, {block.index: block.prefix for block in blocks})
        if found is None:
            return None
        weights, about = found
        recover_unit(self.blocks, name, trial, unit, self._on_device(weights))
        row: dict[str, Any] = about["row"]
        self._add_seconds(name, row["seconds"], about["standalone"])
        return row

    def _on_device(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {full: tensor.to(self.shard.device) for full, tensor in weights.items()}

    def _add_seconds(self, name: str, own: float, standalone: float) -> None:
        for place, seconds in enumerate((own, standalone)):
            self._seconds[name]["recovery"][place] += seconds

    def copy_pruned(self, name: str, copy: str) -> None:
        """Puts the weights that the trial began its recovery with under another name."""
        self.blocks.copy_pruned(name, copy)

    def pruned_rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of the linears that the trial has pruned so far; for masks that were made on a stream."""
        return [row for block in self.blocks.blocks.values() for row in self.blocks.linear_rows(name, block)]

    # Weights on storage, for retraining and from it

    def write_weights(
        self, name: str, folder: Path, masks: str | None = None, survives_crashes: bool = True
    ) -> None:
        """Writes masks (by linear, 0 and 1) and weights of the trial, as the model stores them, block by block.

        masks: the name that they lie under, if it is another;  survives_crashes: as of `write_atomically`
        """
        layers = self.blocks.layers[masks or name]
        for index, block in self.blocks.blocks.items():
            stored = {
                full: linear.as_stored(layers[full].mask_OI).to(torch.uint8)
                for full, linear in block.linears.items()
                if full in layers
            }
            prefix = f"{block.prefix}."
            weights = {f: tensor for f, tensor in self.blocks.weights[name].items() if f.startswith(prefix)}
            write_block(folder, index, stored | weights, survives_crashes)

    def written_bytes(self, name: str, masks: str | None = None) -> int:
        """What `write_weights` takes, about."""
        weights = sum(tensor.nbytes for tensor in self.blocks.weights[name].values())
        return weights + sum(layer.mask.numel() for layer in self.blocks.layers[masks or name].values())

    def read_weights(self, name: str, folder: Path) -> None:
        """Takes over the weights of a retrained model as those of the trial: of its blocks, and of its ends."""
        for index in self.blocks.blocks:
            self._take(name, read_block(folder, index))
        if block_file(folder, OUTSIDE).exists() and (self.shard.is_first or self.shard.is_last):
            parameters = self.shard.model.named_parameters(remove_duplicate=False)
            here = {full for full, parameter in parameters if not parameter.is_meta}
            outside = read_block(folder, OUTSIDE)
            self._take(name, {full: tensor for full, tensor in outside.items() if full in here})

    def _take(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Those of blocks wait for their turn; what lies outside of them is always on the device."""
        inside = tuple(f"{block.prefix}." for block in self.blocks.blocks.values())
        for full, tensor in tensors.items():
            own = tensor.to(self.shard.dtype)
            there = self.blocks.waiting.put(own) if full.startswith(inside) else own.to(self.shard.device)
            self.blocks.weights[name][full] = there

    # Streams: activations on their way through the chain with a trial's weights

    def enter_stream(self, stream: str, text: str, samples: int, start: int, stop: int, hidden: Any) -> None:
        """Takes in a batch: of token ids at the first shard, else what `leave_stream` of the one before gave."""
        rows = slice(start, stop)
        self.blocks.enter_stream(stream, text, samples, rows, self._incoming(text, rows, hidden))

    def leave_stream(self, stream: str, text: str, start: int, stop: int) -> Any:
        """A batch of a stream that has passed all blocks, for the next shard."""
        return to_wire(self.blocks.streams[stream][text][start:stop])

    def fork_stream(self, stream: str, fork: str) -> None:
        """A copy of the calibration set on its way, to be sent ahead."""
        self.blocks.streams[fork] = {CALIBRATION: self.blocks.streams[stream][CALIBRATION].clone()}

    def drop_stream(self, stream: str) -> None:
        self.blocks.streams.pop(stream, None)

    def prune_on_stream(self, name: str, stream: str, trial: Trial, index: int, and_pass: bool) -> None:
        """Prunes one block with statistics of the stream that has arrived at it; and_pass: then moves it on."""
        with self._timed(name, "mask"):
            block = self.blocks.blocks[index]
            self.blocks.prune_on_stream(name, stream, MaskRecipe.of(trial), block)
            if and_pass:
                self.blocks.advance_block(stream, name, block)

    # Units that reach over several shards: each has a part

    def open_part(self, name: str, trial: Trial, unit: str) -> bool:
        """Makes the part of a unit that lies here ready; returns whether something in it is pruned."""
        self._part_began[name] = self._seconds[name]["recovery"][0]
        with self._timed(name, "recovery"):
            part = self._parts[name] = UnitPart(self.blocks, name, trial, unit)
            return is_pruned(self.blocks, name, part.unit)

    def pass_dense(self, name: str, text: str, start: int, stop: int, hidden: Any) -> Any:
        """Passes a batch of what flows into the unit through the dense part; the last one keeps what comes out."""
        with self._timed(name, "recovery"):
            part = self._parts[name]
            output_BTH = part.pass_dense(text, slice(start, stop), self._received(hidden))
            return None if part.unit.is_last else to_wire(output_BTH)

    def pass_recovered(self, name: str, text: str, start: int, stop: int, hidden: Any) -> Any:
        """Passes a batch of the unit's inputs through the part with the trial's weights; the last one returns the
        batch's TextError."""
        with self._timed(name, "recovery"):
            part, rows = self._parts[name], slice(start, stop)
            output_BTH = part.pass_recovered(text, rows, self._received(hidden))
            return part.error(text, rows, output_BTH) if part.unit.is_last else to_wire(output_BTH)

    def pass_stream(self, name: str, text: str, start: int, stop: int, hidden: Any) -> Any:
        """Passes a batch of the trial's stream, which is no input of the unit where these are dense, through the part
        with the trial's weights; what comes out of the last one is the stream behind the unit."""
        with self._timed(name, "recovery"):
            part, rows = self._parts[name], slice(start, stop)
            output_BTH = part.pass_stream(text, rows, self._received(hidden))
            if not part.unit.is_last:
                return to_wire(output_BTH)
            samples = self.blocks.texts[text].activations.samples
            self.blocks.enter_stream(name, text, samples, rows, output_BTH)
            return None

    def begin_training(self, name: str) -> int:
        """Returns the number of steps."""
        with self._timed(name, "recovery"):
            return len(self._parts[name].stage.steps)

    def step_forward(self, name: str, number: int, before: Any, hidden: Any) -> Any:
        """One step's samples through the part. before: the result of what must be over first; only its being there
        counts.

        The last part goes on to the loss and back, and returns the gradient of its input.
        """
        with self._timed(name, "recovery"):
            part = self._parts[name]
            output_BTH = part.forward(number, self._received(hidden))
            return self._backward(part, number, None) if part.unit.is_last else to_wire(output_BTH)

    def step_backward(self, name: str, number: int, gradient: Any) -> Any:
        """Goes back through the part; returns the gradient of its input, None at the first one."""
        with self._timed(name, "recovery"):
            return self._backward(self._parts[name], number, self._received(gradient))

    def gradient_squares(self, name: str, before: Any) -> list[float]:
        """Of a step whose gradients are clipped. before: as in `step_forward`."""
        return self._parts[name].stage.squares()

    def step_clipped(self, name: str, number: int, *squares: list[float]) -> None:
        """Takes the step that `step_backward` left to the moment when the squares of all parts are known."""
        with self._timed(name, "recovery"):
            stage = self._parts[name].stage
            stage.step(number, clip_factor(chain.from_iterable(squares), stage.recipe.max_grad_norm))

    def end_training(self, name: str) -> Cost:
        """What it took. Raises NumericalError when weights are not finite."""
        with self._timed(name, "recovery"):
            part = self._parts[name]
            cost = part.close()
        self._count_unit(part.trial, whole=part.unit.is_last)
        return cost

    def part_seconds(self, name: str) -> float:
        """The busy seconds that the part took so far."""
        return self._seconds[name]["recovery"][0] - self._part_began[name]

    def leave_part(self, name: str, unit: str, folder: Path) -> bool:
        """Keeps the part, a file for every block, so that other shards can take it over; returns whether it did."""
        weights, parts = self.blocks.weights[name], dict[int, dict[str, Tensor]]()
        for block in self._parts[name].unit.blocks:
            prefix = f"{block.prefix}."
            parts[block.index] = {full: part for full, part in weights.items() if full.startswith(prefix)}
        return self._unfinished.leave_part(name, folder, unit, parts, self.part_seconds(name))

    def find_part(self, name: str, unit: str, folder: Path) -> dict[str, Any] | None:
        """Reads what an earlier process has left of the part; returns what it wrote about the unit, None where that is
        not all there."""
        part = self._parts[name]
        blocks = {block.index: block.prefix for block in part.unit.blocks}
        part.found, about = self._unfinished.take(folder, unit, blocks) or (None, None)
        return about

    def take_part(self, name: str, own: float, standalone: float) -> None:
        """Takes over what `find_part` has read. own, standalone: seconds, for the trial's account"""
        self.blocks.weights[name] |= self._on_device(self._parts[name].found or {})
        self._add_seconds(name, own, standalone)

    def close_part(self, name: str) -> None:
        """Forgets the part."""
        self._parts.pop(name).let_go()
        del self._part_began[name]

    def _backward(self, part: UnitPart, number: int, gradient_BTH: Tensor | None) -> Any:
        """Steps at once unless gradients are clipped, for which those of all parts must be known."""
        gradient_BTH = part.backward(number, gradient_BTH)
        if part.stage.recipe.max_grad_norm is None:
            part.stage.step(number, 1.0)
        return None if gradient_BTH is None else to_wire(gradient_BTH)

    # Evaluation

    def forward(
        self,
        name: str | None,
        ends_here: bool,
        text: str,
        start: int,
        stop: int,
        before: tuple[Any, BatchMeasures] | None,
    ) -> Any:
        """Passes a batch, or several that follow one another, through the blocks with the weights of `name` (None:
        dense).

        ends_here: whether the last shard goes on to the losses, and returns what is measured alone
        before: what the shard before returned. Returns hidden states for the next shard, or AS_DENSE, and what is
        measured so far. The calibration set is only compared with the dense model's activations.
        """
        watch, rows = Stopwatch(self.shard.device), slice(start, stop)
        hidden, measures = before or (None, BatchMeasures(text, start, stop))
        losses: list[float] = []
        with self.blocks.using_outside(name):
            incoming = None if self._is_as_dense(name, text, hidden) else self._incoming(text, rows, hidden)
            hidden_BTH, errors = self.blocks.forward(name, text, rows, incoming)
            if self.shard.is_last and text != CALIBRATION:
                if hidden_BTH is None:
                    hidden_BTH = self.blocks.dense_output(text, rows)
                if ends_here:
                    losses = self._losses(hidden_BTH, text, rows)
        is_over = self.shard.is_last and ends_here
        hidden = None if is_over else AS_DENSE if hidden_BTH is None else to_wire(hidden_BTH)
        measures = measures.and_then(losses, errors, watch.seconds())
        return measures if is_over else (hidden, measures)

    def measure(
        self, name: str | None, text: str, start: int, stop: int, before: tuple[Any, BatchMeasures]
    ) -> BatchMeasures:
        """Ends the way of a batch that has passed all blocks: the head with the weights of `name`, and the losses."""
        watch, (hidden, measures) = Stopwatch(self.shard.device), before
        hidden_BTH = from_wire(hidden, self.shard.dtype).to(self.shard.device)
        with self.blocks.using_outside(name):
            losses = self._losses(hidden_BTH, text, slice(start, stop))
        return measures.and_then(losses, {}, watch.seconds())

    def _losses(self, hidden_BTH: Tensor, text: str, rows: slice) -> list[float]:
        ids_BT = self._ids[text][rows]
        self.counts.evaluated_tokens += ids_BT.numel()
        cut = sizes(batches_of(rows, ids_BT.shape[1], self.shard.device))
        pieces = zip(hidden_BTH.split(cut), ids_BT.split(cut), strict=True)
        return [loss for hidden, ids in pieces for loss in window_losses(self.shard, hidden, ids)]

    def finish(self, name: str) -> dict[str, Any]:
        """What this shard knows of the work under a name: busy seconds by phase, zeros among its weights, the most
        memory while its trial was alone here; and of kept texts by block what errors are divided by."""
        texts = [text for text in KEPT_TEXTS if text in self.blocks.texts]
        return {
            "seconds": {phase: tuple(pair) for phase, pair in self._seconds.get(name, {}).items()},
            "dense_seconds": self.blocks.dense_seconds,
            "weight_zeros": self.blocks.zeros(name),
            "peaks": self._trial_peaks.of(name),
            "target_powers": {
                text: {index: self.blocks.target_power(text, index) for index in self.blocks.blocks}
                for text in texts
            },
        }

    def release(self, name: str) -> None:
        """Forgets the weights and figures under `name` and under names that end in `@name`, of models that the trial
        evaluated for others. Releasing twice does no harm."""
        self._unfinished.settle(name)
        known = {*self.blocks.weights, *self.blocks.streams, *self._seconds}
        for each in {name, *(other for other in known if other.endswith(f"@{name}"))}:
            if each in self._parts:
                self._parts.pop(each).let_go()
            self.blocks.release(each)
            self._part_began.pop(each, None)
            self.blocks.knowledge.close_account(each)
            self._seconds.pop(each, None)
        self._trial_peaks.leave(name)

    def close(self) -> None:
        """Waits for what is being written, and gives up all that takes room."""
        self._unfinished.settle()
        self.blocks.forget_texts()
        self.shard.forget_weights()
        self._host_peak.close()

    def peaks(self) -> Peaks:
        """The most memory that this process has held."""
        device = self.shard.device
        return Peaks(self._host_peak.bytes, highest_peak(device) if device.type == "cuda" else None)

    def _lately_held(self) -> Peaks:
        device = self.shard.device
        return Peaks(self._host_peak.lately, lately_highest(device) if device.type == "cuda" else None)

    def _restart_peaks(self) -> None:
        self._host_peak.restart()
        if self.shard.device.type == "cuda":
            restart_peak(self.shard.device)

    @property
    def stored_bytes(self) -> int:
        """Of the dense activations that are kept here."""
        return sum(entry.activations.nbytes for entry in list(self.blocks.texts.values()))  # others may ask

    # Within

    def _count_unit(self, trial: Trial, whole: bool = True) -> None:
        """whole: of one that reaches over several shards only the last part counts as the unit"""
        text = self.blocks.texts[CALIBRATION].activations
        self.counts.units += whole
        self.counts.trained_tokens += (trial.epochs or 0) * text.samples * text.tokens

    def _received(self, hidden: Any) -> Tensor | None:
        return None if hidden is None else from_wire(hidden, self.shard.dtype)

    def _is_as_dense(self, name: str | None, text: str, hidden: Any) -> bool:
        """Whether a text that is kept here comes as in the dense model."""
        if self.shard.is_first:
            return text in self.blocks.texts and not self.blocks.outside(name)
        return isinstance(hidden, str) and hidden == AS_DENSE

    def _incoming(self, text: str, rows: slice, hidden: Any) -> Tensor:
        if self.shard.is_first:
            ids_BT = self._ids[text][rows]
            cut = sizes(batches_of(rows, ids_BT.shape[1], self.shard.device))
            return together([self.shard.embed(piece_BT) for piece_BT in ids_BT.split(cut)])
        return from_wire(hidden, self.shard.dtype)

    @contextmanager
    def _timed(self, name: str, phase: str) -> Iterator[None]:
        saved, watch = self.blocks.knowledge.saved_seconds, Stopwatch(self.shard.device)
        with self.blocks.knowledge.charged_to(name):
            yield
        own = watch.seconds()
        pair = self._seconds[name][phase]
        pair[0] += own
        pair[1] += own + self.blocks.knowledge.saved_seconds - saved
