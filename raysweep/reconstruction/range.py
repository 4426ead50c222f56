"""A range of blocks with all that was learned about it: the part of a sweep that one shard can do alone."""

# O outputs, I inputs of a linear, N tokens of a batch; B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from raysweep.config.trial import Trial
from raysweep.errors import NumericalError
from raysweep.model.linears import Linear
from raysweep.model.shard import ModelShard
from raysweep.model.structure import Block
from raysweep.pruning.criteria import CRITERIA, LayerView, mask_of
from raysweep.pruning.masks import MaskRule
from raysweep.pruning.statistics import InputStatistics, output_error
from raysweep.reconstruction.activations import TextActivations, batches, keep_rows
from raysweep.reconstruction.knowledge import Knowledge, Stopwatch
from raysweep.reconstruction.losses import ratio, squared_sums

CALIBRATION, VALIDATION = "calibration", "validation"
KEPT_TEXTS = (CALIBRATION, VALIDATION)

Weights = dict[str, Tensor]
"""A trial's tensors by full parameter name, as stored in the model; what is missing is dense."""


@dataclass(frozen=True)
class MaskRecipe:
    """All that a mask depends on besides model and calibration set. Equal recipes share their masks."""

    criterion: str
    rule: MaskRule
    seed: int | None

    @classmethod
    def of(cls, trial: Trial) -> MaskRecipe:
        """The recipe of a trial that prunes."""
        if trial.group_size is not None:
            rule = MaskRule(n_of_m=trial.group_size)
        else:
            rule = MaskRule(float(trial.sparsity or 0.0), comparison_group=trial.comparison_group or "row")
        criterion = str(trial.criterion)
        return cls(criterion, rule, trial.seed if CRITERIA[criterion].needs_seed else None)


@dataclass
class RangeText:
    """A text's activations, and the statistics of every input group by the group's first linear."""

    activations: TextActivations
    statistics: dict[str, InputStatistics] = field(default_factory=dict)

    def accumulate(self, name: str, x: Tensor) -> None:
        """Adds one batch of inputs, (..., I), of the linear `name`."""
        x_NI = x.reshape(-1, x.shape[-1])
        if name not in self.statistics:
            self.statistics[name] = InputStatistics.empty(x_NI.shape[1], x.device)
        self.statistics[name].add(x_NI)


class BlockRange:
    """The blocks of one shard, what the dense model does in them, and the weights of the trials in flight.

    Texts pass once through the dense blocks (`dense_pass`), which keeps the activations at the boundaries and
    sums up statistics. A trial is then pruned, recovered unit by unit (`recovery.recover_unit`) and evaluated
    batch by batch, under a name of the caller's choice, until it is released.

    keep_halves: whether the dense pass keeps what flows between the halves of a block
    given_masks: masks by linear that come before those of the criteria
    """

    def __init__(self, shard: ModelShard, knowledge_bytes: int = 2 << 30) -> None:
        self.shard = shard
        self.blocks = {block.index: block for block in shard.blocks}
        self.device = shard.device
        self.knowledge = Knowledge(self.device, knowledge_bytes)
        self.texts: dict[str, RangeText] = {}
        self.keep_halves = True
        self.dense_seconds = 0.0
        self.dense_batches = 0
        self.weights: dict[str, Weights] = {}
        self.given_masks: dict[str, Tensor] = {}
        self._errors: dict[tuple[str, str, int], dict[int, float]] = {}

    # The dense pass

    def forget_texts(self) -> None:
        """Before another calibration set: drops activations, statistics and all that came of them."""
        self.texts.clear()
        self.weights.clear()
        self.knowledge.clear()
        self._errors.clear()
        self.dense_seconds = 0.0

    @torch.no_grad()
    def dense_pass(self, text: str, samples: int, rows: slice, hidden_BTH: Tensor) -> Tensor:
        """Passes one batch of a kept text through the dense blocks; keeps boundaries and statistics."""
        watch = Stopwatch(self.device)
        entry = self.texts.setdefault(text, RangeText(TextActivations(samples)))
        inputs = entry.activations.inputs
        hidden_BTH = hidden_BTH.to(self.device)
        for block in self.blocks.values():
            keep_rows(inputs, block.index, samples, rows, hidden_BTH)
            hidden_BTH = self._dense_block(block, entry, rows, hidden_BTH)
        keep_rows(inputs, self.shard.stop, samples, rows, hidden_BTH)
        self.dense_seconds += watch.seconds()
        self.dense_batches += 1
        return hidden_BTH

    def _dense_block(self, block: Block, entry: RangeText, rows: slice, hidden_BTH: Tensor) -> Tensor:
        """One block, every linear once under watch; with the halves' outputs where trials will need them."""
        watched = partial(block.watch_inputs, entry.accumulate, block.leaders)
        if not self.keep_halves:
            with watched():
                return block.run(hidden_BTH)
        halves, kept = block.halves, entry.activations
        if halves.parallel:
            with watched():
                output_BTH = block.run(hidden_BTH)
            middle_BTH, mlp_BTH = block.run(hidden_BTH, halves.attention), block.run(hidden_BTH, halves.mlp)
            keep_rows(kept.mlp_outputs, block.index, kept.samples, rows, mlp_BTH)
        else:
            with watched():
                middle_BTH = block.run(hidden_BTH, halves.attention)
                output_BTH = block.run(middle_BTH, halves.mlp)
        keep_rows(kept.middles, block.index, kept.samples, rows, middle_BTH)
        return output_BTH

    def statistics(self, text: str, linear: Linear, block: Block) -> InputStatistics:
        """Of the dense inputs of a linear of the block."""
        return self.texts[text].statistics[block.leader_of(linear.name)]

    # Masks

    def mask(self, recipe: MaskRecipe, block: Block, linear: Linear) -> Tensor:
        """The mask (O, I), bool, True = kept. Computed once for all trials of an equal recipe.

        Raises NumericalError when the scores are not finite.
        """
        if linear.name in self.given_masks:
            return self.given_masks[linear.name]

        def make() -> Tensor:
            statistics = self.statistics(CALIBRATION, linear, block)
            view = LayerView(linear.name, linear.weight_OI, statistics, recipe.seed or 0)
            try:
                return mask_of(recipe.criterion, view, recipe.rule)
            except NumericalError as error:
                raise NumericalError(f"{linear.name}: {error}") from error

        return self.knowledge.get(("mask", recipe, linear.name), make)

    def prune(self, name: str, recipe: MaskRecipe, block: Block) -> None:
        """Puts the masked weights of one block under the trial `name`."""
        weights = self.weights.setdefault(name, {})
        for linear in block.linears.values():
            mask_OI = self.mask(recipe, block, linear)
            weights[f"{linear.name}.weight"] = linear.as_stored(linear.weight_OI * mask_OI)

    def linear_rows(self, recipe: MaskRecipe, block: Block) -> list[dict[str, object]]:
        """One row per linear of the block: sparsity, dead inputs, error of its output before recovery."""
        return self.knowledge.get(
            ("linear_rows", recipe, block.index),
            lambda: [self._linear_row(recipe, block, linear) for linear in block.linears.values()],
        )

    def _linear_row(self, recipe: MaskRecipe, block: Block, linear: Linear) -> dict[str, object]:
        mask_OI = self.mask(recipe, block, linear)
        return {
            "kind": "linear",
            "unit": linear.name,
            "block": block.index,
            "linears": linear.name,
            "realized_sparsity": 1.0 - float(mask_OI.count_nonzero()) / mask_OI.numel(),
            "dead_inputs": self.statistics(CALIBRATION, linear, block).dead_inputs,
            "error_before": self.matrix_error(CALIBRATION, block, linear, linear.weight_OI * mask_OI),
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

    @contextmanager
    def using(self, name: str | None, block: Block) -> Iterator[None]:
        """The block runs with the weights of the trial `name` within the context; dense with None."""
        weights = self.weights[name] if name is not None else {}
        mine = {full: tensor for full, tensor in weights.items() if full.startswith(f"{block.prefix}.")}
        dense: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for full, tensor in mine.items():
                parameter = block.module.get_parameter(full.removeprefix(f"{block.prefix}."))
                dense.append((parameter, parameter.data))
                parameter.data = tensor
            yield
        finally:
            for parameter, data in dense:
                parameter.data = data

    @torch.no_grad()
    def forward(self, name: str | None, text: str, rows: slice, hidden_BTH: Tensor) -> Tensor:
        """One batch through the blocks with the weights of `name`.

        For a kept text, the squared error of every block's output against the dense one is noted.
        """
        hidden_BTH = hidden_BTH.to(self.device)
        for block in self.blocks.values():
            with self.using(name, block):
                hidden_BTH = block.run(hidden_BTH)
            if name is not None and text in self.texts:
                self._note_error(name, text, block, rows, hidden_BTH)
        return hidden_BTH

    def _note_error(self, name: str, text: str, block: Block, rows: slice, hidden_BTH: Tensor) -> None:
        dense_BTH = self.texts[text].activations.inputs[block.index + 1][rows].to(self.device)
        errors = self._errors.setdefault((name, text, block.index), {})
        sums = squared_sums(hidden_BTH.float() - dense_BTH.float())
        errors.update(zip(range(rows.start, rows.stop), sums, strict=True))

    def block_errors(self, name: str, text: str) -> dict[int, float]:
        """By block, the error of its output over the text against the dense one, as `forward` noted it."""
        return {
            index: ratio(self._errors[name, text, index].values(), self._target_power(text, index))
            for index in self.blocks
            if (name, text, index) in self._errors
        }

    def _target_power(self, text: str, index: int) -> list[float]:
        target_STH = self.texts[text].activations.inputs[index + 1]

        def make() -> list[float]:
            pieces = batches(target_STH.shape[0], target_STH.shape[1], self.device)
            return [total for rows in pieces for total in squared_sums(target_STH[rows])]

        return self.knowledge.get(("target_power", text, index), make)

    def release(self, name: str) -> None:
        """Forgets a trial's weights and noted errors."""
        self.weights.pop(name, None)
        for key in [key for key in self._errors if key[0] == name]:
            del self._errors[key]
