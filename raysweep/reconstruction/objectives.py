"""What the recovery of a unit works on: its inputs, targets and error, and what a step costs."""

# O outputs, I inputs of a linear; S samples, B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from raysweep.config.trial import Trial
from raysweep.model.linears import Linear
from raysweep.model.structure import Block
from raysweep.reconstruction.activations import batches, fetch, keep_rows
from raysweep.reconstruction.boundaries import INPUT, MIDDLE, MLP_OUTPUT, Boundaries
from raysweep.reconstruction.entry_norm import EntryNorm
from raysweep.reconstruction.feed import in_batches
from raysweep.reconstruction.losses import LOSSES, batch_error
from raysweep.reconstruction.measures import CALIBRATION, TextError
from raysweep.reconstruction.profile import UnitProfile, profile_step
from raysweep.reconstruction.programs import run_compiled
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.units import Unit, units_of

Instead = Mapping[str, Tensor] | None
"""Tensors, by full name, that stand in for parameters of the unit."""


class Objective(Protocol):
    """A unit of one trial on its way back to the dense unit."""

    def parameter_names(self) -> list[str]:
        """What may be trained: full names of parameters."""
        ...

    def entry_norms(self) -> list[EntryNorm]:
        """Norms that the unit begins with and the weights behind them, by full names; where the unit begins here."""
        ...

    def run(self, inputs: Tensor, instead: Instead = None, compiles: bool = False) -> Tensor:
        """The output that is trained, with the weights that the modules hold now."""
        ...

    def inputs(self, text: str) -> Tensor:
        """Of the whole unit, by sample; `run` takes any samples of them. Where the unit begins here."""
        ...

    def targets(self, text: str) -> Tensor | None:
        """What `run` should give, by sample; None for zeros. Where the unit ends here, while its blocks are dense."""
        ...

    def error(self, text: str) -> TextError:
        """How far the unit with the trial's weights is from the dense one over a whole text."""
        ...

    def flops(self, samples: int) -> int:
        """Of the products that training on so many samples takes."""
        ...

    def step_bytes(self) -> int:
        """What a step holds besides parameters, their gradients and the optimizer's state."""
        ...


def objective_of(blocks: BlockRange, name: str, trial: Trial, unit: Unit) -> Objective:
    """The objective of a unit under the trial `name`."""
    if unit.linear is None:
        return ModuleObjective(blocks, name, trial, unit)
    if trial.input_stream == "dense" and trial.loss == "mse":
        return MatrixObjective(blocks, name, trial, unit.block, unit.linear)
    return MatrixOnTokens(blocks, name, trial, unit.block, unit.linear)


def batch_size_of(blocks: BlockRange, trial: Trial) -> int:
    """Samples of one step."""
    return min(trial.batch_size or 1, blocks.texts[CALIBRATION].activations.samples)


class ModuleObjective:
    """Blocks, or half of one, trained towards what the dense ones give.

    own_targets: by text, what the dense unit makes of its pruned input, once that was worked out
    """

    def __init__(self, blocks: BlockRange, name: str, trial: Trial, unit: Unit) -> None:
        self.blocks, self.name, self.trial, self.unit = blocks, name, trial, unit
        self.batch = batch_size_of(blocks, trial)
        self.profiles = [self._profile(unit, block) for block in unit.blocks]  # while the blocks are dense
        self._names = self._parameter_names()
        self.own_targets: dict[str, Tensor] = {}

    def parameter_names(self) -> list[str]:
        """Those that the output depends on, and at granularity subblock no other unit's output.

        A norm that both halves of a parallel block read stays dense: trained by one it would spoil the other. Experts
        that too few tokens are routed to stay as they are.
        """
        return self._names

    def entry_norms(self) -> list[EntryNorm]:
        if not self.unit.is_first:
            return []
        prefix = self.unit.block.prefix
        return [
            EntryNorm(f"{prefix}.{entry.norm}", tuple(f"{prefix}.{name}" for name in entry.weights))
            for entry in self.profiles[0].entry_norms
        ]

    def run(self, inputs_BTH: Tensor, instead: Instead = None, compiles: bool = False) -> Tensor:
        run = run_compiled if compiles else Block.run
        if self.unit.half is not None:
            return run(self.unit.block, inputs_BTH, self.unit.module, instead)
        for block in self.unit.blocks:
            mine = {name: t for name, t in (instead or {}).items() if name.startswith(f"{block.prefix}.")}
            inputs_BTH = run(block, inputs_BTH, block.module, mine)
        return inputs_BTH

    def inputs(self, text: str) -> Tensor:
        if self.trial.input_stream == "pruned":
            return self.blocks.streams[self.name][text]
        return self._dense_inputs(text)

    def targets(self, text: str) -> Tensor:
        if self.trial.target_stream == "dense":
            return self._dense_targets(text)
        if text not in self.own_targets:
            self.own_targets[text] = self._outputs(self.inputs(text))
        return self.own_targets[text]

    @torch.no_grad()
    def error(self, text: str) -> TextError:
        inputs_STH, targets_STH = self.inputs(text), self.targets(text)
        loss, total = LOSSES[str(self.trial.loss)], TextError()
        with (
            self.blocks.using_all(self.name, self.unit.blocks),
            in_batches([inputs_STH, targets_STH], self.blocks.device) as given,
        ):
            for input_BTH, target_BTH in given:
                total += batch_error(loss, self.run(input_BTH), target_BTH)
        return total

    def flops(self, samples: int) -> int:
        return sum(profile.step_flops for profile in self.profiles) * samples // self.batch

    def step_bytes(self) -> int:
        text = self._activations(CALIBRATION)
        boundary = text.get(INPUT, self.unit.block.index)[0].nbytes * self.batch
        saved = sum(profile.saved_bytes for profile in self.profiles)
        return saved + boundary * (self.unit.is_first + self.unit.is_last)

    def _dense_inputs(self, text: str) -> Tensor:
        """What the dense model feeds the unit, (S, T, H)."""
        unit, activations = self.unit, self._activations(text)
        sequential_mlp = unit.half == "mlp" and not unit.block.halves.parallel
        return activations.get(MIDDLE if sequential_mlp else INPUT, unit.block.index)

    def _dense_targets(self, text: str) -> Tensor:
        """What the dense unit makes of its dense inputs, (S, T, H)."""
        unit, activations = self.unit, self._activations(text)
        if unit.half == "attention":
            return activations.get(MIDDLE, unit.block.index)
        if unit.half == "mlp" and unit.block.halves.parallel:
            return activations.get(MLP_OUTPUT, unit.block.index)
        return activations.get(INPUT, unit.stop)

    @torch.no_grad()
    def _outputs(self, inputs_STH: Tensor) -> Tensor:
        """Of the unit with the weights that it holds now."""
        outputs_STH = self.blocks.store.empty(inputs_STH.shape, inputs_STH.dtype)
        for rows in batches(inputs_STH.shape[0], inputs_STH.shape[1], self.blocks.device):
            outputs_STH[rows] = self.run(fetch(inputs_STH, rows, self.blocks.device)).to(outputs_STH.device)
        return outputs_STH

    def _activations(self, text: str) -> Boundaries:
        return self.blocks.texts[text].activations

    def _parameter_names(self) -> list[str]:
        pairs = zip(self.unit.blocks, self.profiles, strict=True)
        left = tuple(
            f"{linear.name}."
            for block in self.unit.blocks
            for linear in block.linears.values()
            if self.blocks.starves(linear, block)
        )
        names = [
            name for block, profile in pairs for name in _full(block, profile) if not name.startswith(left)
        ]
        if self.unit.half is None:
            return names
        halves = units_of([self.unit.block], "subblock", self.blocks.shard.blocks_in_model)
        (other,) = (unit for unit in halves if unit.half != self.unit.half)
        shared = set(_full(other.block, self._profile(other, other.block)))
        return [name for name in names if name not in shared]

    def _profile(self, unit: Unit, block: Block) -> UnitProfile:
        """Of a half, or of one block. Shared by all trials, not by blocks of equal shape: which parameters matter may
        differ between them."""
        kind = MIDDLE if unit.half == "mlp" and not block.halves.parallel else INPUT
        batch_BTH = self._activations(CALIBRATION).get(kind, block.index)[: self.batch].to(self.blocks.device)
        module = block.module if unit.half is None else unit.module
        block.arguments(*batch_BTH.shape[:2])  # made once for all steps of a shape, and no part of any
        key = ("profile", block.index, unit.half, tuple(batch_BTH.shape))
        run = partial(block.run, module=module)
        routed = tuple(f"{name.removeprefix(f'{block.prefix}.')}." for name in block.routed)
        return self.blocks.knowledge.get(key, lambda: profile_step(module, run, batch_BTH, routed))


def _full(block: Block, profile: UnitProfile) -> list[str]:
    return [f"{block.prefix}.{name}" for name in profile.parameters]


class _Matrix:
    """A matrix alone: what its two objectives share. One product: there is nothing to compile."""

    def __init__(self, blocks: BlockRange, name: str, trial: Trial, block: Block, linear: Linear) -> None:
        self.blocks, self.name, self.trial, self.block, self.linear = blocks, name, trial, block, linear
        self.weight = linear.module.get_parameter("weight")
        self.bias = None if linear.bias_O is None else linear.module.get_parameter("bias")
        self.dense_OI, self.dense_bias_O = linear.weight_OI, linear.bias_O  # made while the block is dense

    def parameter_names(self) -> list[str]:
        return [f"{self.linear.name}.{name}" for name, _ in self.linear.module.named_parameters()]

    def entry_norms(self) -> list[EntryNorm]:
        return []

    def flops(self, samples: int) -> int:
        """Two products a step, each two operations a weight and token."""
        return 4 * self.dense_OI.numel() * samples * self.blocks.texts[CALIBRATION].activations.tokens

    def step_bytes(self) -> int:
        """The change of the weight and its gradient; input, output and the output's gradient."""
        tokens = self.blocks.texts[CALIBRATION].activations.tokens * batch_size_of(self.blocks, self.trial)
        outputs, inputs = self.dense_OI.shape
        return 2 * self.dense_OI.nbytes + tokens * (inputs + 2 * outputs) * self.dense_OI.element_size()

    def _current(self, instead: Instead) -> tuple[Tensor, Tensor | None]:
        """Weight (O, I) and bias that run now."""
        weight = (instead or {}).get(f"{self.linear.name}.weight", self.weight)
        bias = (instead or {}).get(f"{self.linear.name}.bias", self.bias)
        return self.linear.from_stored(weight), bias


class MatrixObjective(_Matrix):
    """On dense inputs with the squared error: y' - y = X (W' - W)^T + (b' - b), so no target is computed or stored."""

    def run(self, inputs_BTI: Tensor, instead: Instead = None, compiles: bool = False) -> Tensor:
        """y' - y, (B, T, O)."""
        weight_OI, bias_O = self._current(instead)
        if bias_O is None or self.dense_bias_O is None:
            return functional.linear(inputs_BTI, weight_OI - self.dense_OI)
        return functional.linear(inputs_BTI, weight_OI - self.dense_OI, bias_O - self.dense_bias_O)

    def inputs(self, text: str) -> Tensor:
        return dense_linear_inputs(self.blocks, text, self.block, self.linear)

    def targets(self, text: str) -> None:
        return None

    def error(self, text: str) -> TextError:
        """From the Gram matrix: no token passes through the layer again."""
        weights = self.blocks.weights[self.name]
        weight_OI = self.linear.from_stored(weights[f"{self.linear.name}.weight"])
        bias_O = weights.get(f"{self.linear.name}.bias")
        statistics = self.blocks.statistics.of(text, self.linear, self.block)
        error = self.blocks.matrix_error(text, self.block, self.linear, weight_OI, bias_O)
        power = self.blocks.output_power(text, self.block, self.linear)
        total = error * power
        return TextError((total,), (power,), (total,), statistics.rows * weight_OI.shape[0])


class MatrixOnTokens(_Matrix):
    """On other inputs than the dense ones, or with another loss: outputs and targets are computed token by token."""

    def run(self, inputs_BTI: Tensor, instead: Instead = None, compiles: bool = False) -> Tensor:
        """y', (B, T, O)."""
        return functional.linear(inputs_BTI, *self._current(instead))

    def inputs(self, text: str) -> Tensor:
        if self.trial.input_stream == "dense":
            return dense_linear_inputs(self.blocks, text, self.block, self.linear)
        return stream_linear_inputs(self.blocks, self.name, text, self.block, self.linear)

    @torch.no_grad()
    def targets(self, text: str) -> Tensor:
        """W x + b of the dense matrix, for its dense input or for the one that it gets now; (S, T, O)."""
        own = self.trial.input_stream == self.trial.target_stream
        inputs_STI = (
            self.inputs(text) if own else dense_linear_inputs(self.blocks, text, self.block, self.linear)
        )
        samples, tokens, _ = inputs_STI.shape
        size = (samples, tokens, self.dense_OI.shape[0])
        targets_STO = self.blocks.store.empty(size, inputs_STI.dtype)
        for rows in batches(samples, tokens, self.blocks.device):
            inputs_BTI = fetch(inputs_STI, rows, self.blocks.device)
            targets_STO[rows] = functional.linear(inputs_BTI, self.dense_OI, self.dense_bias_O)
        return targets_STO

    @torch.no_grad()
    def error(self, text: str) -> TextError:
        inputs_STI, targets_STO = self.inputs(text), self.targets(text)
        loss, total = LOSSES[str(self.trial.loss)], TextError()
        with (
            self.blocks.using(self.name, self.block),
            in_batches([inputs_STI, targets_STO], self.blocks.device) as given,
        ):
            for input_BTI, target_BTO in given:
                total += batch_error(loss, self.run(input_BTI), target_BTO)
        return total


def dense_linear_inputs(blocks: BlockRange, text: str, block: Block, linear: Linear) -> Tensor:
    """The dense inputs (S, T, I) of a linear over a kept text, which is none of an expert; shared with those beside it.

    The dense block runs once more to give them, in the batches of the dense pass: the same numbers.
    """
    hidden_STH = blocks.texts[text].activations.get(INPUT, block.index)
    leaders = [leader for leader in block.leaders if leader not in block.routed]
    make = partial(_linear_inputs, blocks, hidden_STH, block, leaders)
    return blocks.knowledge.get(("linear_inputs", text, block.index), make)[block.leader_of(linear.name)]


def stream_linear_inputs(blocks: BlockRange, name: str, text: str, block: Block, linear: Linear) -> Tensor:
    """The inputs (S, T, I) of a linear behind what the trial `name` has made of all before it, also in its block.

    Linears that share their input are recovered one after another, and none changes what it takes in: the inputs are
    kept until another group's are asked for.
    """
    leader = block.leader_of(linear.name)
    known = blocks.captured.get((name, text))
    if known is None or known[0] != leader:
        with blocks.using(name, block):
            inputs = _linear_inputs(blocks, blocks.streams[name][text], block, [leader])
        known = blocks.captured[name, text] = (leader, inputs[leader])
    return known[1]


@torch.no_grad()
def _linear_inputs(
    blocks: BlockRange, hidden_STH: Tensor, block: Block, leaders: list[str]
) -> dict[str, Tensor]:
    """Inputs by leader when `hidden_STH` passes through the block with the weights that it holds now."""
    samples, tokens, _ = hidden_STH.shape
    kept: dict[str, Tensor] = {}

    def keep(rows: slice, name: str, x: Tensor) -> None:
        keep_rows(kept, name, samples, rows, x.reshape(rows.stop - rows.start, tokens, -1), blocks.store)

    for rows in batches(samples, tokens, blocks.device):
        with block.watch_inputs(partial(keep, rows), leaders):
            block.run(fetch(hidden_STH, rows, blocks.device))
    return kept
