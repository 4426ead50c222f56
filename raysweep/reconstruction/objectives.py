"""What the training of a unit works on: its parameters, inputs, targets and error, and what a step costs."""

# O outputs, I inputs of a linear; S samples, B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from raysweep.model.linears import Linear
from raysweep.model.structure import Block
from raysweep.reconstruction.activations import TextActivations, batches, fetch, keep_rows
from raysweep.reconstruction.losses import TextError
from raysweep.reconstruction.profile import UnitProfile, profile_step
from raysweep.reconstruction.range import CALIBRATION, BlockRange
from raysweep.reconstruction.training import text_error
from raysweep.reconstruction.units import Unit, units_of


class Objective(Protocol):
    """A unit of one trial on its way back to the dense unit. Made while the block holds its dense weights."""

    def parameter_names(self) -> list[str]:
        """What may be trained: names of parameters within the unit's module."""
        ...

    def run(self, inputs: Tensor) -> Tensor:
        """The output that is trained, with the weights that the module holds now."""
        ...

    def inputs(self) -> Tensor:
        """Over the calibration set, by sample; `run` takes any samples of them."""
        ...

    def targets(self) -> Tensor | None:
        """What `run` should give, by sample; None for zeros."""
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


def objective_of(blocks: BlockRange, name: str, unit: Unit, batch_size: int) -> Objective:
    """The objective of a unit under the trial `name`, in steps of `batch_size` samples."""
    batch = min(batch_size, blocks.texts[CALIBRATION].activations.samples)
    if unit.linear is not None:
        return MatrixObjective(blocks, name, unit.block, unit.linear, batch)
    return ModuleObjective(blocks, name, unit, batch)


class ModuleObjective:
    """A block or one of its halves, trained towards the dense model's output of it."""

    def __init__(self, blocks: BlockRange, name: str, unit: Unit, batch: int) -> None:
        self.blocks, self.name, self.unit, self.batch = blocks, name, unit, batch
        self.profile = self._profile(unit)

    def parameter_names(self) -> list[str]:
        """Those that the output depends on, and at granularity subblock no other unit's output.

        A norm that both halves of a parallel block read stays dense: trained by one it would spoil the other.
        """
        names = self.profile.parameters
        if self.unit.half is None:
            return list(names)
        (other,) = (unit for unit in units_of(self.unit.block, "subblock") if unit.half != self.unit.half)
        shared = set(self._profile(other).parameters)
        return [name for name in names if name not in shared]

    def run(self, inputs_BTH: Tensor) -> Tensor:
        return self.unit.block.run(inputs_BTH, self.unit.module)

    def inputs(self) -> Tensor:
        return self.unit.inputs(self._calibration)

    def targets(self) -> Tensor:
        return self.unit.targets(self._calibration)

    def error(self, text: str) -> TextError:
        activations = self.blocks.texts[text].activations
        inputs_STH, targets_STH = self.unit.inputs(activations), self.unit.targets(activations)
        with self.blocks.using(self.name, self.unit.block):
            return text_error(self.run, inputs_STH, targets_STH, self.blocks.device)

    def flops(self, samples: int) -> int:
        return self.profile.step_flops * samples // self.batch

    def step_bytes(self) -> int:
        input_and_target = 2 * self.inputs()[0].nbytes * self.batch
        return self.profile.saved_bytes + input_and_target

    @property
    def _calibration(self) -> TextActivations:
        return self.blocks.texts[CALIBRATION].activations

    def _profile(self, unit: Unit) -> UnitProfile:
        """Shared by all trials. Not by blocks of equal shape: which parameters matter may differ between them."""
        batch_BTH = unit.inputs(self._calibration)[: self.batch].to(self.blocks.device)
        key = ("profile", unit.name, tuple(batch_BTH.shape))
        run = partial(unit.block.run, module=unit.module)
        return self.blocks.knowledge.get(key, lambda: profile_step(unit.module, run, batch_BTH))


class MatrixObjective:
    """A matrix on its dense inputs: y' - y = X (W' - W)^T + (b' - b), so no target is computed or stored."""

    def __init__(self, blocks: BlockRange, name: str, block: Block, linear: Linear, batch: int) -> None:
        self.blocks, self.name, self.block, self.linear, self.batch = blocks, name, block, linear, batch
        self.weight = linear.module.get_parameter("weight")
        self.bias = None if linear.bias_O is None else linear.module.get_parameter("bias")
        self.dense_OI, self.dense_bias_O = linear.weight_OI, linear.bias_O

    def parameter_names(self) -> list[str]:
        return [name for name, _ in self.linear.module.named_parameters()]

    def run(self, inputs_BTI: Tensor) -> Tensor:
        """y' - y, (B, T, O)."""
        delta_OI = self.linear.from_stored(self.weight) - self.dense_OI
        if self.bias is None or self.dense_bias_O is None:
            return functional.linear(inputs_BTI, delta_OI)
        return functional.linear(inputs_BTI, delta_OI, self.bias - self.dense_bias_O)

    def inputs(self) -> Tensor:
        return linear_inputs(self.blocks, self.block, self.linear)

    def targets(self) -> None:
        return None

    def error(self, text: str) -> TextError:
        """From the Gram matrix: no token passes through the layer again."""
        weights = self.blocks.weights[self.name]
        weight_OI = self.linear.from_stored(weights[f"{self.linear.name}.weight"])
        bias_O = weights.get(f"{self.linear.name}.bias")
        statistics = self.blocks.statistics(text, self.linear, self.block)
        error = self.blocks.matrix_error(text, self.block, self.linear, weight_OI, bias_O)
        power = self.blocks.output_power(text, self.block, self.linear)
        return TextError((error * power,), (power,), statistics.rows * weight_OI.shape[0])

    def flops(self, samples: int) -> int:
        """Two products a step, each two operations a weight and token."""
        return 4 * self.dense_OI.numel() * samples * self.blocks.texts[CALIBRATION].activations.tokens

    def step_bytes(self) -> int:
        """The change of the weight and its gradient; input, output and the output's gradient."""
        tokens = self.blocks.texts[CALIBRATION].activations.tokens * self.batch
        outputs, inputs = self.dense_OI.shape
        return 2 * self.dense_OI.nbytes + tokens * (inputs + 2 * outputs) * self.dense_OI.element_size()


@torch.no_grad()
def linear_inputs(blocks: BlockRange, block: Block, linear: Linear) -> Tensor:
    """The dense inputs (S, T, I) of a linear over the calibration set, shared with the linears beside it.

    The dense block runs once more to give them, in the batches of the dense pass: the same numbers.
    """
    text = blocks.texts[CALIBRATION].activations

    def make() -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for rows in batches(text.samples, text.tokens, blocks.device):
            with block.watch_inputs(partial(_keep_inputs, kept, text, rows), block.leaders):
                block.run(fetch(text.inputs[block.index], rows, blocks.device))
        return kept

    inputs = blocks.knowledge.get(("linear_inputs", block.index), make)
    return inputs[block.leader_of(linear.name)]


def _keep_inputs(kept: dict[str, Tensor], text: TextActivations, rows: slice, name: str, x: Tensor) -> None:
    keep_rows(kept, name, text.samples, rows, x.reshape(rows.stop - rows.start, text.tokens, -1))
