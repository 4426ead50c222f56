"""A range of blocks with all that was learned about it: the part of a sweep that one shard can do alone."""

# O outputs, I inputs of a linear, N tokens of a batch; S samples, B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from raysweep.config.criterion import is_mask_file, reads_statistics
from raysweep.errors import NumericalError, RaysweepError
from raysweep.model.linears import Linear
from raysweep.model.shard import ModelShard
from raysweep.model.structure import Block
from raysweep.pruning.criteria import LayerView, OwnFunction, PrunedLayer, prune_layer
from raysweep.pruning.mask_file import MaskFile
from raysweep.pruning.recipe import MaskRecipe
from raysweep.pruning.sparsegpt import InverseFactor, inverse_factor
from raysweep.pruning.statistics import InputStatistics, alike, output_error
from raysweep.reconstruction.activations import batches, fetch, keep_rows
from raysweep.reconstruction.boundaries import INPUT, MIDDLE, MLP_OUTPUT, Boundaries
from raysweep.reconstruction.hand import Hand, WaitingWeights
from raysweep.reconstruction.knowledge import Knowledge, Stopwatch
from raysweep.reconstruction.losses import squared_sums
from raysweep.reconstruction.measures import CALIBRATION, BlockErrors, ratio
from raysweep.reconstruction.placement import ANEW, DEVICE, Placement
from raysweep.reconstruction.stores import Store

Weights = dict[str, Tensor]
"""A trial's tensors by full parameter name, as stored in the model; what is missing is dense."""

Statistics = dict[str, InputStatistics]
"""Of the inputs of a block's input groups, by the group's first linear."""

Run = Callable[[Tensor], Tensor]


FEWEST_TOKENS = 32
"""That an expert needs in the calibration set for its statistics to be used: with fewer, the norm of an input (if it is
normal) has a standard error of more than an eighth of itself, 1 / sqrt(2 n)."""


def starved(linear: Linear, block: Block, statistics: InputStatistics) -> bool:
    """Whether a linear is of an expert that too few tokens of these statistics are routed to."""
    return linear.name in block.routed and statistics.rows < FEWEST_TOKENS


def accumulate(statistics: Statistics, name: str, x: Tensor) -> None:
    """Adds one batch of inputs, (..., I), of the linear `name`."""
    x_NI = x.reshape(-1, x.shape[-1])
    if name not in statistics:
        statistics[name] = InputStatistics.empty(x_NI.shape[1], x.device)
    statistics[name].add(x_NI)


@dataclass
class RangeText:
    """A text's dense activations, and the statistics of every input group of every block, where its inputs are watched:
    where they wait, or of the one block that they were made anew of."""

    activations: Boundaries
    is_watched: bool
    statistics: Statistics = field(default_factory=dict)
    made_of: int | None = None


class BlockRange:
    """The blocks of one shard, what the dense model does in them, and the trials in flight.

    Texts pass once through the dense blocks, batch by batch (`dense_pass`), or block by block where blocks come into
    hand one after another (`enter_dense`, `pass_block`): that keeps the activations at the boundaries and sums up
    statistics. A trial is then pruned, recovered unit by unit (`recovery.recover_unit`) and evaluated batch by batch,
    under a name of the caller's choice, until it is released.

    keep_halves: whether the dense pass goes half by half, for trials that need what flows between
    matrices: whether statistics are also taken of texts that no mask comes from: errors of matrices follow from them
    store, waiting: where activations are kept, and weights and masks of trials;  compiles: whether training on a GPU is
    compiled
    own_criteria: functions and paths of mask files that users bring along, by the text that names them
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
        self.waiting = self._store(self.placement.trials)
        self.compiles = False
        self.own_criteria: dict[str, OwnFunction | Path] = {}
        self.dense_seconds = 0.0
        self.dense_batches = 0
        self.weights: dict[str, Weights] = {}
        self.layers: dict[str, dict[str, PrunedLayer]] = {}
        self.recipes: dict[str, MaskRecipe] = {}
        self.streams: dict[str, dict[str, Tensor]] = {}
        self.captured: dict[tuple[str, str], tuple[str, Tensor]] = {}
        self._statistics_in_hand: tuple[str, str, InputStatistics] | None = None
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
        self._statistics_in_hand = None
        self.dense_seconds = 0.0

    @torch.no_grad()
    def dense_pass(self, text: str, samples: int, rows: slice, hidden_BTH: Tensor) -> Tensor:
        """Passes one batch of a kept text through the dense blocks; keeps boundaries and statistics."""
        watch = Stopwatch(self.device)
        entry = self._entry(text, samples)
        hidden_BTH = hidden_BTH.to(self.device)
        for block in self.blocks.values():
            entry.activations.write((INPUT, block.index), rows, hidden_BTH)
            hidden_BTH = self._dense_block(block, entry, rows, hidden_BTH)
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
        watch, entry, block = Stopwatch(self.device), self.texts[text], self.blocks[index]
        activations, powers = entry.activations, list[float]()
        source_STH = activations.get(INPUT, index)
        is_kept = activations.keeps((INPUT, index + 1))

        def passed() -> Iterator[tuple[slice, Tensor]]:
            for rows in batches(source_STH.shape[0], source_STH.shape[1], self.device):
                output_BTH = self._dense_block(block, entry, rows, fetch(source_STH, rows, self.device))
                if not is_kept:
                    powers.extend(squared_sums(output_BTH))
                self.dense_batches += 1
                yield rows, output_BTH

        with self.using(None, block):
            activations.write_all((INPUT, index + 1), passed())
        if not is_kept:  # or all of it would be made anew for this one number
            self.knowledge.keep(("target_power", text, index), math.fsum(powers))
        self._put_statistics_away(entry, block)
        self.dense_seconds += watch.seconds()

    def _put_statistics_away(self, entry: RangeText, block: Block) -> None:
        if self.placement.statistics == ANEW:
            entry.statistics, entry.made_of = {}, None
            return
        store = self._store(self.placement.statistics)
        for leader in entry.statistics.keys() & set(block.leaders):
            entry.statistics[leader] = entry.statistics[leader].moved(store.put)

    def _dense_block(self, block: Block, entry: RangeText, rows: slice, hidden_BTH: Tensor) -> Tensor:
        """One block, every linear once under watch; with the halves' outputs where trials will need them."""
        leaders = block.leaders if entry.is_watched and self.placement.statistics != ANEW else []
        watched = partial(block.watch_inputs, partial(accumulate, entry.statistics), leaders)
        if not self.keep_halves:
            with watched():
                return block.run(hidden_BTH)
        halves, kept = block.halves, entry.activations
        if halves.parallel:
            with watched():
                output_BTH = block.run(hidden_BTH)
            middle_BTH, mlp_BTH = block.run(hidden_BTH, halves.attention), block.run(hidden_BTH, halves.mlp)
            kept.write((MLP_OUTPUT, block.index), rows, mlp_BTH)
        else:
            with watched():
                middle_BTH = block.run(hidden_BTH, halves.attention)
                output_BTH = block.run(middle_BTH, halves.mlp)
        kept.write((MIDDLE, block.index), rows, middle_BTH)
        return output_BTH

    def statistics(self, text: str, linear: Linear, block: Block) -> InputStatistics:
        """Of the dense inputs of a linear of the block, on the device; of an expert that no token was routed to, those
        of no rows."""
        leader = block.leader_of(linear.name)
        if self._statistics_in_hand is not None and self._statistics_in_hand[:2] == (text, leader):
            return self._statistics_in_hand[2]
        entry = self.texts[text]
        if self.placement.statistics == ANEW and entry.made_of != block.index:
            entry.statistics, entry.made_of = self._statistics_anew(text, block), block.index
        found = _of_linear(entry.statistics, block, linear)
        if self.placement.statistics in (DEVICE, ANEW):
            return found
        self._statistics_in_hand = None  # before another takes its place
        found = found.moved(lambda tensor: tensor.to(self.device))
        self._statistics_in_hand = (text, leader, found)
        return found

    def put_statistics_down(self) -> None:
        """Before a unit is trained: what it was pruned by takes no room on the device."""
        self._statistics_in_hand = None
        if self.placement.statistics == ANEW:
            for entry in self.texts.values():
                entry.statistics, entry.made_of = {}, None

    @torch.no_grad()
    def _statistics_anew(self, text: str, block: Block) -> Statistics:
        """In the order of the dense pass, so that the sums are the same."""
        made: Statistics = {}
        source_STH = self.texts[text].activations.get(INPUT, block.index)
        with self.using(None, block), block.watch_inputs(partial(accumulate, made), block.leaders):
            for rows in batches(source_STH.shape[0], source_STH.shape[1], self.device):
                self.texts[text].activations.through(block, fetch(source_STH, rows, self.device))
        return made

    def starves(self, linear: Linear, block: Block) -> bool:
        """Whether it is of an expert that too few calibration tokens are routed to: recovery leaves it as it is."""
        routed = linear.name in block.routed
        return routed and starved(linear, block, self.statistics(CALIBRATION, linear, block))

    # Masks

    def pruned_layer(self, recipe: MaskRecipe, block: Block, linear: Linear) -> PrunedLayer | None:
        """What a recipe does to a linear; None where it leaves it dense. Worked out once for all trials.

        Raises NumericalError when scores are not finite or a Gram matrix cannot be factorized.
        """
        if is_mask_file(recipe.criterion):
            make_from_file = partial(self._layer_of_file, self.own_criteria[recipe.criterion], linear)
            of_file: PrunedLayer | None = self.knowledge.get(("layer", recipe, linear.name), make_from_file)
            return of_file
        if not recipe.prunes(linear.name):
            return None
        if recipe.stream == "pruned":
            return self.knowledge.get(("layer", recipe, linear.name), _not_passed)
        leader = block.leader_of(linear.name)

        def factor(dampening: float) -> InverseFactor:
            make = partial(self._factor_on_host, linear, block, dampening)
            return self.knowledge.get(("factor", leader, dampening), make).to(self.device)

        def make() -> PrunedLayer:
            statistics = self.statistics(CALIBRATION, linear, block)
            return self._pruned(recipe, block, linear, statistics, factor).moved(self.waiting.put)

        return self.knowledge.get(("layer", recipe, linear.name), make)

    def _layer_of_file(self, path: OwnFunction | Path, linear: Linear) -> PrunedLayer | None:
        layer = _layer_of_file(path, linear)
        return None if layer is None else layer.moved(self.waiting.put)

    def _factor_on_host(self, linear: Linear, block: Block, dampening: float) -> InverseFactor:
        """Kept where memory is plenty: copying it costs little beside making it again."""
        return inverse_factor(self.statistics(CALIBRATION, linear, block), dampening).to("cpu")

    def prune(self, name: str, recipe: MaskRecipe, block: Block) -> None:
        """Puts the pruned weights of one block under the trial `name`."""
        self.recipes[name] = recipe
        with self.using(None, block):
            for linear in block.linears.values():
                layer = self.pruned_layer(recipe, block, linear)
                if layer is not None:
                    self._put(name, linear, layer)

    def prune_on_stream(self, name: str, stream: str, recipe: MaskRecipe, block: Block) -> None:
        """The same with statistics of what the dense block takes in on a stream that has arrived at it.

        All statistics of a block are taken before any of it is pruned. Layers that depend on the recipe alone (stream
        `pruned`) are kept for other trials.
        """
        self.recipes[name] = recipe
        with self.using(None, block):
            self._prune_on_stream(name, stream, recipe, block)

    def _prune_on_stream(self, name: str, stream: str, recipe: MaskRecipe, block: Block) -> None:
        statistics = self._stream_statistics(stream, block)
        factors: dict[tuple[str, float], InverseFactor] = {}

        def factor(leader: str, dampening: float) -> InverseFactor:
            if (leader, dampening) not in factors:
                factors[leader, dampening] = inverse_factor(statistics[leader], dampening)
            return factors[leader, dampening]

        for linear in block.linears.values():
            if recipe.prunes(linear.name):
                leader = block.leader_of(linear.name)
                own = _of_linear(statistics, block, linear)
                layer = self._pruned(recipe, block, linear, own, partial(factor, leader))
                layer = layer.moved(self.waiting.put)
                self._put(name, linear, layer)
                if recipe.stream == "pruned":
                    self.knowledge.keep(("layer", recipe, linear.name), layer)

    def _pruned(
        self,
        recipe: MaskRecipe,
        block: Block,
        linear: Linear,
        statistics: InputStatistics,
        factor: Callable[[float], InverseFactor],
    ) -> PrunedLayer:
        view = LayerView(linear.name, linear.weight_OI, statistics, factor)
        if starved(linear, block, statistics) and reads_statistics(recipe.criterion):
            return self._pruned_blindly(recipe, view)
        return self._pruned_seeing(recipe, view)

    def _pruned_seeing(self, recipe: MaskRecipe, view: LayerView) -> PrunedLayer:
        try:
            return prune_layer(recipe, view, self.own_criteria)
        except NumericalError as error:
            raise NumericalError(f"{view.name}: {error}") from error

    def _pruned_blindly(self, recipe: MaskRecipe, view: LayerView) -> PrunedLayer:
        """As if all its inputs were alike; the row says so."""
        unknown = alike(view.weight_OI.shape[1], self.device)
        layer = self._pruned_seeing(
            recipe, replace(view, statistics=unknown, factor=partial(inverse_factor, unknown))
        )
        rows, dead = view.statistics.rows, view.statistics.dead_inputs
        said = f"inputs taken as alike: {rows} of {FEWEST_TOKENS} routed tokens"
        return replace(layer, dead_inputs=dead, dampening=None, fallback=said)

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
        return [self._linear_row(self.recipes[name], block, linear, layers[linear.name]) for linear in pruned]

    def _linear_row(
        self, recipe: MaskRecipe, block: Block, linear: Linear, layer: PrunedLayer
    ) -> dict[str, object]:
        make = partial(self._new_linear_row, block, linear, layer)
        if recipe.stream == "recovered":  # a mask of the trial's own
            return make()
        return dict(self.knowledge.get(("row", recipe, linear.name), make))

    def _new_linear_row(self, block: Block, linear: Linear, layer: PrunedLayer) -> dict[str, object]:
        mask_OI = layer.mask_OI.to(self.device)
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
        statistics, power = self.statistics(text, linear, block), self.output_power(text, block, linear)
        dense_bias = linear.bias_O
        delta_bias = None if bias_O is None or dense_bias is None else bias_O - dense_bias
        error = output_error(statistics, weight_OI.float() - linear.weight_OI.float(), delta_bias)
        return ratio([error], [power])

    def output_power(self, text: str, block: Block, linear: Linear) -> float:
        """Squared dense output of a linear, summed over the rows of its dense inputs and its outputs."""
        statistics = self.statistics(text, linear, block)
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
        """One batch through the blocks with the weights of `name`; for a kept text also how far every block's output
        then is from the dense one.

        hidden_BTH: None where a kept text arrives as in the dense model. Its activations are known up to the first
        block that is not dense, so they are not computed again; what comes out is None where all blocks are.
        """
        errors: BlockErrors = {}
        compares = name is not None and text in self.texts
        if hidden_BTH is not None:
            hidden_BTH = hidden_BTH.to(self.device)
        for block in self.blocks.values():
            if hidden_BTH is None and self._is_dense(name, block):
                errors[block.index] = [0.0] * (rows.stop - rows.start)
                continue
            if hidden_BTH is None:
                hidden_BTH = self.texts[text].activations.rows(block.index, rows, self.device)
            with self.using(name, block):
                hidden_BTH = block.run(hidden_BTH)
            if compares:
                errors[block.index] = self._block_error(text, block, rows, hidden_BTH)
        return hidden_BTH, errors if compares else {}

    def dense_output(self, text: str, rows: slice) -> Tensor:
        """What leaves the range when a batch of a kept text passes through the dense model."""
        return self.texts[text].activations.rows(self.shard.stop, rows, self.device)

    def _is_dense(self, name: str | None, block: Block) -> bool:
        return name is None or not any(full.startswith(f"{block.prefix}.") for full in self.weights[name])

    def _block_error(self, text: str, block: Block, rows: slice, hidden_BTH: Tensor) -> list[float]:
        dense_BTH = self.texts[text].activations.rows(block.index + 1, rows, self.device)
        return squared_sums(hidden_BTH.float() - dense_BTH.float())

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


def _of_linear(statistics: Statistics, block: Block, linear: Linear) -> InputStatistics:
    leader = block.leader_of(linear.name)
    if leader not in statistics and linear.name in block.routed:
        return InputStatistics.empty(linear.weight_OI.shape[1], linear.weight_OI.device)
    return statistics[leader]


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


def _layer_of_file(path: OwnFunction | Path, linear: Linear) -> PrunedLayer | None:
    """Only this linear's tensors are read."""
    file = MaskFile(Path(str(path)))
    mask, weight = file.mask(linear.name), file.weight(linear.name)
    if mask is None:
        return None
    dense_OI = linear.weight_OI
    mask_OI = linear.from_stored(mask.to(dense_OI.device)).contiguous()
    if weight is None:
        return PrunedLayer(mask_OI)
    weight_OI = linear.from_stored(weight.to(dense_OI.device, dense_OI.dtype)) * mask_OI
    return PrunedLayer(mask_OI, weight_OI.contiguous())


def _not_passed() -> PrunedLayer:
    raise RaysweepError("masks behind pruned blocks were asked for before the activations had passed by")
