"""A range of blocks with all that was learned about it: the part of a sweep that one shard can do alone."""

# O outputs, I inputs of a linear, N tokens of a batch; S samples, B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from raysweep.model.linears import Linear
from raysweep.model.shard import ModelShard
from raysweep.model.structure import Block
from raysweep.pruning.criteria import PrunedLayer
from raysweep.pruning.recipe import MaskRecipe
from raysweep.pruning.statistics import output_error
from raysweep.reconstruction.activations import batches, batches_of, fetch, keep_rows, sizes, together
from raysweep.reconstruction.boundaries import INPUT, MIDDLE, MLP_OUTPUT, Boundaries
from raysweep.reconstruction.dense_statistics import DenseStatistics, Statistics, accumulate, starved
from raysweep.reconstruction.feed import one_ahead
from raysweep.reconstruction.hand import Hand, WaitingWeights
from raysweep.reconstruction.heap import give_back
from raysweep.reconstruction.knowledge import Knowledge, Stopwatch
from raysweep.reconstruction.losses import squared_sums, squared_sums_B
from raysweep.reconstruction.measures import CALIBRATION, BlockErrors, ratio
from raysweep.reconstruction.placement import DEVICE, Placement
from raysweep.reconstruction.pruner import LayerPruner
from raysweep.reconstruction.stores import Store

Weights = dict[str, Tensor]
"""A trial's tensors by full parameter name, as stored in the model; what is missing is dense."""

Run = Callable[[Tensor], Tensor]


@dataclass
class RangeText:
    """A text's dense activations, and whether statistics are taken of what the linears see of it."""

    activations: Boundaries
    is_watched: bool


class BlockRange:
    """The blocks of one shard, what the dense model does in them, and the trials in flight.

    Texts pass once through the dense blocks, batch by batch (`dense_pass`), or block by block where blocks come into
    hand one after another (`enter_dense`, `pass_block`): that keeps the activations at the boundaries and sums up
    statistics. A trial is then pruned, recovered unit by unit (`recovery.recover_unit`) and evaluated batch by batch,
    under a name of the caller's choice, until it is released.

    keep_halves: whether the dense pass goes half by half, for trials that need what flows between
    matrices: whether statistics are also taken of texts that no mask comes from: errors of matrices follow from them
    statistics: of the dense inputs of its linears;  pruner: what recipes do to them
    store, waiting: where activations are kept, and weights and masks of trials;  compiles: whether training on a GPU is
    compiled
    weights, layers, recipes: by trial, its weights, what pruning did to each linear (by full name), and by which recipe
    streams: by name and text, activations (S, T, H) on their way through the blocks with a trial's weights; where they
    have arrived is known to whoever moves them
    captured: by trial and text, the input group last looked at on a stream and its inputs (S, T, I)
    """

    def __init__(
        self, shard: ModelShard, knowledge_bytes: int = 2 << 30, placement: Placement | None = None
    ) -> None:
        """placement: `Placement()` by default;  shard: loaded with `waits` where blocks are to come into hand one by
        one"""
        self.shard, self.placement = shard, placement or Placement()
        self.blocks = {block.index: block for block in shard.blocks}
        self.device = shard.device
        self.knowledge = Knowledge(self.device, knowledge_bytes)
        self.texts: dict[str, RangeText] = {}
        self.keep_halves = self.matrices = True
        self.store = self._store(self.placement.activations)
        self.compiles = False
        self.statistics = DenseStatistics(
            self.placement, self.device, partial(_pass_again, self.texts, self.device)
        )
        self.waiting = self._store(self.placement.trials)
        self.pruner = LayerPruner(self.knowledge, self.statistics, self.waiting)
        self.dense_seconds = 0.0
        self.dense_batches = 0
        self.weights: dict[str, Weights] = {}
        self.layers: dict[str, dict[str, PrunedLayer]] = {}
        self.recipes: dict[str, MaskRecipe] = {}
        self.streams: dict[str, dict[str, Tensor]] = {}
        self.captured: dict[tuple[str, str], tuple[str, Tensor]] = {}
        self._hand: Hand | None = None
        if self.placement.weights != DEVICE:
            weights = WaitingWeights(shard, self.placement.weights)
            self._hand = Hand(weights, self.weights, self.waiting)
            for block in self.blocks.values():
                block.in_hand = partial(self.using, None, block)

    def _store(self, kind: str) -> Store:
        return Store(kind, self.device, self.placement.scratch)

    # The dense pass

    def forget_texts(self) -> None:
        """Before another calibration set: drops activations, statistics and all that came of them."""
        for name in {*self.weights, *self.streams}:
            self.release(name)
        for store in (self.texts, self.weights, self.layers, self.recipes, self.streams, self.captured):
            store.clear()
        self.knowledge.clear()
        self.statistics.clear()
        self.dense_seconds = 0.0

    @torch.no_grad()
    def dense_pass(self, text: str, samples: int, rows: slice, hidden_BTH: Tensor) -> Tensor:
        """Passes one batch of a kept text through the dense blocks; keeps boundaries and statistics."""
        watch = Stopwatch(self.device)
        entry = self._entry(text, samples)
        hidden_BTH = hidden_BTH.to(self.device)
        for block in self.blocks.values():
            entry.activations.write((INPUT, block.index), rows, hidden_BTH)
            hidden_BTH = self._dense_block(block, text, rows, hidden_BTH)
        entry.activations.write((INPUT, self.shard.stop), rows, hidden_BTH)
        self.dense_seconds += watch.seconds()
        self.dense_batches += 1
        return hidden_BTH

    def _entry(self, text: str, samples: int) -> RangeText:
        if text not in self.texts:
            boundaries = Boundaries(self.blocks, samples, self.store, self.placement, self.keep_halves)
            self.texts[text] = RangeText(boundaries, text == CALIBRATION or self.matrices)
        return self.texts[text]

    def enter_dense(self, text: str, samples: int, rows: slice, hidden_BTH: Tensor) -> None:
        """Takes in one batch of a kept text, for `pass_block`."""
        self._entry(text, samples).activations.write(
            (INPUT, self.shard.start), rows, hidden_BTH.to(self.device)
        )

    @torch.no_grad()
    def pass_block(self, text: str, index: int) -> None:
        """Passes a kept text that has arrived at a block through it; keeps its statistics and what comes out."""
        watch, block = Stopwatch(self.device), self.blocks[index]
        activations, powers = self.texts[text].activations, list[float]()
        source_STH = activations.get(INPUT, index)
        is_kept = activations.keeps((INPUT, index + 1))

        def passed() -> Iterator[tuple[slice, Tensor]]:
            for rows in batches(source_STH.shape[0], source_STH.shape[1], self.device):
                output_BTH = self._dense_block(block, text, rows, fetch(source_STH, rows, self.device))
                if not is_kept:
                    powers.extend(squared_sums(output_BTH))
                self.dense_batches += 1
                yield rows, output_BTH

        with self.using(None, block):
            activations.write_all((INPUT, index + 1), passed())
        if not is_kept:  # or all of it would be made anew for this one number
            self.knowledge.keep(("target_power", text, index), math.fsum(powers))
        self.statistics.put_away(text, block)
        self.dense_seconds += watch.seconds()

    def _dense_block(self, block: Block, text: str, rows: slice, hidden_BTH: Tensor) -> Tensor:
        """One block, every linear once under watch; with the halves' outputs where trials will need them."""
        entry = self.texts[text]
        watching = self.statistics.watching(text, block) if entry.is_watched else nullcontext()
        if not self.keep_halves:
            with watching:
                return block.run(hidden_BTH)
        halves, kept = block.halves, entry.activations
        if halves.parallel:
            with watching:
                output_BTH = block.run(hidden_BTH)
            middle_BTH, mlp_BTH = block.run(hidden_BTH, halves.attention), block.run(hidden_BTH, halves.mlp)
            kept.write((MLP_OUTPUT, block.index), rows, mlp_BTH)
        else:
            with watching:
                middle_BTH = block.run(hidden_BTH, halves.attention)
                output_BTH = block.run(middle_BTH, halves.mlp)
        kept.write((MIDDLE, block.index), rows, middle_BTH)
        return output_BTH

    def starves(self, linear: Linear, block: Block) -> bool:
        """Whether it is of an expert that too few calibration tokens are routed to: recovery leaves it as it is."""
        routed = linear.name in block.routed
        return routed and starved(linear, block, self.statistics.rows(CALIBRATION, linear, block))

    # Masks

    def prune(self, name: str, recipe: MaskRecipe, block: Block) -> None:
        """Puts the pruned weights of one block under the trial `name`."""
        self.recipes[name] = recipe
        with self.using(None, block):
            for linear in block.linears.values():
                layer = self.pruner.layer(recipe, block, linear)
                if layer is not None:
                    self._put(name, linear, layer)

    def prune_on_stream(self, name: str, stream: str, recipe: MaskRecipe, block: Block) -> None:
        """The same with statistics of what the dense block takes in on a stream that has arrived at it. All are taken
        before any of the block is pruned."""
        self.recipes[name] = recipe
        with self.using(None, block):
            statistics = self._stream_statistics(stream, block)
            for linear, layer in self.pruner.layers_on_stream(recipe, block, statistics):
                self._put(name, linear, layer)

    def _put(self, name: str, linear: Linear, layer: PrunedLayer) -> None:
        self.layers[name][linear.name] = layer
        self.weights[name][f"{linear.name}.weight"] = linear.as_stored(layer.masked(linear.weight_OI))

    @torch.no_grad()
    def _stream_statistics(self, stream: str, block: Block) -> Statistics:
        statistics: Statistics = {}
        hidden_STH = self.streams[stream][CALIBRATION]
        with block.watch_inputs(partial(accumulate, statistics), block.leaders):
            for rows in batches(hidden_STH.shape[0], hidden_STH.shape[1], self.device):
                block.run(fetch(hidden_STH, rows, self.device))
        return statistics

    def linear_rows(self, name: str, block: Block) -> list[dict[str, object]]:
        """One row per pruned linear of the block: sparsity, dead inputs, error of its output before recovery."""
        layers = self.layers[name]
        pruned = [linear for linear in block.linears.values() if linear.name in layers]
        # from the last one on, whose Gram matrix is still in hand behind `prune`
        rows = [
            self._linear_row(self.recipes[name], block, linear, layers[linear.name])
            for linear in reversed(pruned)
        ]
        return rows[::-1]

    def _linear_row(
        self, recipe: MaskRecipe, block: Block, linear: Linear, layer: PrunedLayer
    ) -> dict[str, object]:
        make = partial(self._new_linear_row, block, linear, layer)
        if recipe.stream == "recovered":  # a mask of the trial's own
            return make()
        return dict(self.knowledge.get(("row", recipe, linear.name), make))

    def _new_linear_row(self, block: Block, linear: Linear, layer: PrunedLayer) -> dict[str, object]:
        mask_OI = layer.mask.on(self.device)
        with self.using(None, block):
            masked_OI = layer.masked(linear.weight_OI)
            error = self.matrix_error(CALIBRATION, block, linear, masked_OI)
        return {
            "kind": "linear",
            "unit": linear.name,
            "block": block.index,
            "linears": linear.name,
            "realized_sparsity": 1.0 - float(mask_OI.count_nonzero()) / mask_OI.numel(),
            "dead_inputs": layer.dead_inputs,
            "dampening_used": layer.dampening,
            "fallback": layer.fallback,
            "error_before": error,
        }

    def matrix_error(
        self, text: str, block: Block, linear: Linear, weight_OI: Tensor, bias_O: Tensor | None = None
    ) -> float:
        """Squared error of a linear's output over its squared dense output, from the Gram matrix."""
        statistics, power = self.statistics.of(text, linear, block), self.output_power(text, block, linear)
        dense_bias = linear.bias_O
        delta_bias = None if bias_O is None or dense_bias is None else bias_O - dense_bias
        error = output_error(statistics, weight_OI.float() - linear.weight_OI.float(), delta_bias)
        return ratio([error], [power])

    def output_power(self, text: str, block: Block, linear: Linear) -> float:
        """Squared dense output of a linear, summed over the rows of its dense inputs and its outputs."""
        statistics = self.statistics.of(text, linear, block)
        return self.knowledge.get(
            ("power", text, linear.name), lambda: output_error(statistics, linear.weight_OI, linear.bias_O)
        )

    # Trials in flight

    def begin(self, name: str) -> None:
        """From here on the range knows the trial `name`: what is not pruned or recovered under it is dense."""
        self.weights.setdefault(name, {})
        self.layers.setdefault(name, {})

    def copy_pruned(self, name: str, copy: str) -> None:
        """Puts the weights that the trial `name` had before its recovery under the name `copy`."""
        self.begin(copy)
        self.recipes[copy] = self.recipes[name]
        for block in self.blocks.values():
            mine = [linear for linear in block.linears.values() if linear.name in self.layers[name]]
            if mine:
                with self.using(None, block):
                    for linear in mine:
                        self._put(copy, linear, self.layers[name][linear.name])

    @contextmanager
    def using(self, name: str | None, block: Block) -> Iterator[None]:
        """The block runs with the weights of the trial `name` within the context; dense with None."""
        prefix = f"{block.prefix}."
        with self.holding(name, block) as tensors:
            mine = {full.removeprefix(prefix): t for full, t in tensors.items() if full.startswith(prefix)}
            with _exchanged(block.module, mine):
                yield

    @contextmanager
    def in_hand(self, name: str, blocks: Iterable[Block]) -> Iterator[None]:
        """Within the context the blocks are dense, and their tensors lie on the device, those of the trial `name` as
        well."""
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(self.using(None, block))
                stack.enter_context(self.holding(name, block))
            yield

    def holding(self, name: str | None, block: Block) -> AbstractContextManager[Weights]:
        """Within the context the trial's tensors of the block are on the device in `weights`, and stay. Yields what
        stands in the place of the block's own."""
        if self._hand is None:
            return nullcontext(self.weights[name] if name is not None else {})
        following = self.blocks.get(block.index + 1, self.blocks[self.shard.start])
        return self._hand.hold(name, block, following)

    def changed(self, name: str, block: Block) -> None:
        """Training has changed the trial's tensors of the block in their place."""
        if self._hand is not None:
            self._hand.changed(name, block)

    @contextmanager
    def using_outside(self, name: str | None) -> Iterator[None]:
        """The same of what lies outside of all blocks: embedding, last norm and head, where they are the trial's."""
        with _exchanged(self.shard.model, self.outside(name)):
            yield

    def outside(self, name: str | None) -> dict[str, Tensor]:
        """The trial's own weights there, by name."""
        weights = self.weights[name] if name is not None else {}
        prefixes = tuple(f"{block.prefix}." for block in self.blocks.values())
        return {full: tensor for full, tensor in weights.items() if not full.startswith(prefixes)}

    @contextmanager
    def using_all(self, name: str | None, blocks: Iterable[Block]) -> Iterator[None]:
        """The same for several blocks."""
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(self.using(name, block))
            yield

    @torch.no_grad()
    def forward(
        self, name: str | None, text: str, rows: slice, hidden_BTH: Tensor | None
    ) -> tuple[Tensor | None, BlockErrors]:
        """One batch, or several, through the blocks with the weights of `name`; for a kept text also how far every
        block's output then is from the dense one.

        hidden_BTH: None where a kept text arrives as in the dense model. Its activations are known up to the first
        block that is not dense, so they are not computed again; what comes out is None where all blocks are.
        """
        self.statistics.put_down()
        errors = dict[int, Tensor]()
        compares = name is not None and text in self.texts
        tokens = self.texts[text].activations.tokens if hidden_BTH is None else hidden_BTH.shape[1]
        pieces = batches_of(rows, tokens, self.device)
        passing = None if hidden_BTH is None else list(hidden_BTH.to(self.device).split(sizes(pieces)))
        for block in self.blocks.values():
            if passing is None and self._is_dense(name, block):
                errors[block.index] = torch.zeros(rows.stop - rows.start, dtype=torch.float64)
                continue
            if passing is None:
                passing = [
                    self.texts[text].activations.rows(block.index, piece, self.device) for piece in pieces
                ]
            dense = self._dense_rows(text, block.index + 1, pieces) if compares else None
            with self.using(name, block):
                for place, hidden_BTH in enumerate(passing):
                    passing[place] = block.run(hidden_BTH)
            if dense is not None:
                compared = zip(passing, dense, strict=True)
                errors[block.index] = torch.cat([squared_sums_B(x.float() - y.float()) for x, y in compared])
        numbers = {index: error_B.tolist() for index, error_B in errors.items()} if compares else {}
        return None if passing is None else together(passing), numbers

    def dense_output(self, text: str, rows: slice) -> Tensor:
        """What leaves the range when samples of a kept text pass through the dense model."""
        activations = self.texts[text].activations
        pieces = batches_of(rows, activations.tokens, self.device)
        return together([activations.rows(self.shard.stop, piece, self.device) for piece in pieces])

    def _is_dense(self, name: str | None, block: Block) -> bool:
        return name is None or not any(full.startswith(f"{block.prefix}.") for full in self.weights[name])

    def _dense_rows(self, text: str, index: int, pieces: Sequence[slice]) -> Iterator[Tensor]:
        """What enters a block in the dense model, piece by piece."""
        activations = self.texts[text].activations
        stored_STH = activations.stored(index)
        if stored_STH is not None:
            return one_ahead(stored_STH, pieces, self.device)
        return (activations.rows(index, piece, self.device) for piece in pieces)

    def zeros(self, name: str) -> int:
        """Among the prunable weights of the trial."""
        weights = self.weights.get(name, {})
        own = (f"{linear}.weight" for block in self.blocks.values() for linear in block.linears)
        return sum(self._zeros_of(name, full, weights[full]) for full in own if full in weights)

    def _zeros_of(self, name: str, full: str, tensor: Tensor) -> int:
        counted = self._hand.zeros(name, full) if self._hand is not None else None
        return tensor.numel() - int(tensor.count_nonzero()) if counted is None else counted

    def target_power(self, text: str, index: int) -> float:
        """The squared dense output of a block, summed over a kept text: what errors are divided by."""

        def make() -> float:
            target_STH = self.texts[text].activations.get(INPUT, index + 1)
            pieces = batches(target_STH.shape[0], target_STH.shape[1], self.device)
            return math.fsum(
                total for rows in pieces for total in squared_sums(fetch(target_STH, rows, self.device))
            )

        return self.knowledge.get(("target_power", text, index), make)

    # Streams

    def enter_stream(self, stream: str, text: str, samples: int, rows: slice, hidden_BTH: Tensor) -> None:
        """Takes in one batch of a text that has come from the blocks before this range."""
        keep_rows(self.streams.setdefault(stream, {}), text, samples, rows, hidden_BTH, self.store)

    @torch.no_grad()
    def advance(self, stream: str, run: Run) -> None:
        """Moves a stream on: what it holds becomes what `run` makes of it."""
        for hidden_STH in self.streams[stream].values():
            for rows in batches(hidden_STH.shape[0], hidden_STH.shape[1], self.device):
                hidden_STH[rows] = run(fetch(hidden_STH, rows, self.device)).to(hidden_STH.device)

    def advance_block(self, stream: str, name: str | None, block: Block) -> None:
        """Moves a stream through a block with the weights of the trial `name`."""
        with self.using(name, block):
            self.advance(stream, block.run)

    def release(self, name: str) -> None:
        """Forgets a trial's weights, layers and stream."""
        if self._hand is not None:
            self._hand.forget(name)
        self.weights.pop(name, None)
        self.layers.pop(name, None)
        self.recipes.pop(name, None)
        self.streams.pop(name, None)
        for captured in [key for key in self.captured if key[0] == name]:
            del self.captured[captured]
        if self._hand is not None:  # memory is what there is little of
            give_back()


@torch.no_grad()
def _pass_again(texts: Mapping[str, RangeText], device: torch.device, text: str, block: Block) -> None:
    """Through a block as the dense pass does, for what is learned on the way.

    No method of the range: one that its own parts hold would keep it, and all that it has on a device, until Python
    looks for cycles.
    """
    activations = texts[text].activations
    source_STH = activations.get(INPUT, block.index)
    with block.in_hand():
        for rows in batches(source_STH.shape[0], source_STH.shape[1], device):
            activations.through(block, fetch(source_STH, rows, device))


@contextmanager
def _exchanged(module: nn.Module, tensors: Weights) -> Iterator[None]:
    """The module's parameters of these names hold other tensors within the context."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for name, tensor in tensors.items():
            parameter = module.get_parameter(name)
            before.append((parameter, parameter.data))
            parameter.data = tensor
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
