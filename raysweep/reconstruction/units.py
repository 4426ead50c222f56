"""The spans over which the reconstruction loss is taken: which module runs, on which inputs, towards what."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from raysweep.model.linears import Linear
from raysweep.model.structure import Block
from raysweep.reconstruction.activations import TextActivations


@dataclass(frozen=True)
class Unit:
    """One unit. `module` is what runs, `linear` is set where it is one matrix, `half` where half a block."""

    name: str
    block: Block
    module: nn.Module
    linear: Linear | None = None
    half: str | None = None

    @property
    def linears(self) -> dict[str, Linear]:
        """The prunable linears in the unit, by full name."""
        if self.linear is not None:
            return {self.linear.name: self.linear}
        inside = set(self.module.modules())
        return {name: linear for name, linear in self.block.linears.items() if linear.module in inside}

    def parameter_name(self, name: str) -> str:
        """The full name in the model of a parameter of the unit's module."""
        prefix = self.linear.name if self.linear is not None else self.block.prefix
        return f"{prefix}.{name}"

    def inputs(self, text: TextActivations) -> Tensor:
        """What the dense model feeds the unit, (S, T, H). Not for a single matrix."""
        sequential_mlp = self.half == "mlp" and not self.block.halves.parallel
        return (text.middles if sequential_mlp else text.inputs)[self.block.index]

    def targets(self, text: TextActivations) -> Tensor:
        """What the dense unit makes of its dense inputs, (S, T, H). Not for a single matrix."""
        if self.half == "attention":
            return text.middles[self.block.index]
        if self.half == "mlp" and self.block.halves.parallel:
            return text.mlp_outputs[self.block.index]
        return text.inputs[self.block.index + 1]


def units_of(block: Block, granularity: str) -> list[Unit]:
    """The units of one block, in the order in which they run."""
    if granularity == "block":
        return [Unit(f"{block.index}", block, block.module)]
    if granularity == "subblock":
        halves = {"attention": block.halves.attention, "mlp": block.halves.mlp}
        return [Unit(f"{block.index}.{half}", block, module, half=half) for half, module in halves.items()]
    return [_matrix_unit(block, block.linears[name]) for names in block.input_groups for name in names]


def _matrix_unit(block: Block, linear: Linear) -> Unit:
    short = linear.name.removeprefix(f"{block.prefix}.")
    return Unit(f"{block.index}.{short}", block, linear.module, linear=linear)
