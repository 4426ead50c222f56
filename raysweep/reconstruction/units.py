"""The spans over which the reconstruction loss is taken: which modules run, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from raysweep.config.spellings import MODEL, window_length
from raysweep.model.linears import Linear
from raysweep.model.structure import Block


@dataclass(frozen=True)
class Unit:
    """One unit, or the part of it in this range of blocks.

    start, stop: the blocks of the whole unit;  blocks: those that lie here, in order
    linear: set where it is one matrix;  half: attention or mlp where it is half a block
    opens_block, closes_block: whether its first block begins with it, and whether its last one is done with it
    """

    name: str
    start: int
    stop: int
    blocks: tuple[Block, ...]
    linear: Linear | None = None
    half: str | None = None
    opens_block: bool = True
    closes_block: bool = True

    @property
    def block(self) -> Block:
        """Its first block here; the only one unless the unit is a window or the model."""
        return self.blocks[0]

    @property
    def is_first(self) -> bool:
        """Whether the unit begins here."""
        return self.block.index == self.start

    @property
    def is_last(self) -> bool:
        """Whether the unit ends here."""
        return self.blocks[-1].index == self.stop - 1

    @property
    def module(self) -> nn.Module:
        """What runs, where it is a matrix, half a block or one block."""
        if self.linear is not None:
            return self.linear.module
        if self.half is None:
            return self.block.module
        return self.block.halves.attention if self.half == "attention" else self.block.halves.mlp

    @property
    def linears(self) -> dict[str, Linear]:
        """The linears in this part of the unit, by full name."""
        if self.linear is not None:
            return {self.linear.name: self.linear}
        inside = {name: linear for block in self.blocks for name, linear in block.linears.items()}
        if self.half is None:
            return inside
        modules = set(self.module.modules())
        return {name: linear for name, linear in inside.items() if linear.module in modules}

    def block_of(self, name: str) -> Block:
        """The block that a linear or parameter of that full name is in."""
        return next(block for block in self.blocks if name.startswith(f"{block.prefix}."))


def units_of(blocks: Sequence[Block], granularity: str, blocks_in_model: int) -> list[Unit]:
    """The units of a range of blocks, in the order in which they run; a unit that reaches beyond it in part."""
    length = blocks_in_model if granularity == MODEL else window_length(granularity)
    if length is None:
        return [unit for block in blocks for unit in _units_within(block, granularity)]
    starts = sorted({block.index - block.index % length for block in blocks})
    return [_window(blocks, start, min(start + length, blocks_in_model), granularity) for start in starts]


def _window(blocks: Sequence[Block], start: int, stop: int, granularity: str) -> Unit:
    inside = tuple(block for block in blocks if start <= block.index < stop)
    name = MODEL if granularity == MODEL else f"{start}-{stop - 1}"
    return Unit(name, start, stop, inside)


def _units_within(block: Block, granularity: str) -> list[Unit]:
    whole = Unit(f"{block.index}", block.index, block.index + 1, (block,))
    if granularity == "block":
        return [whole]
    if granularity == "subblock":
        return [
            replace(whole, name=f"{block.index}.attention", half="attention", closes_block=False),
            replace(whole, name=f"{block.index}.mlp", half="mlp", opens_block=False),
        ]
    names = [name for group in block.input_groups for name in group]
    return [
        replace(
            whole,
            name=f"{block.index}.{name.removeprefix(f'{block.prefix}.')}",
            linear=block.linears[name],
            opens_block=name == names[0],
            closes_block=name == names[-1],
        )
        for name in names
    ]
