"""Statistics of the dense inputs of linears: kept on the device, where others wait, or summed up anew."""

# I inputs of a linear, N tokens of a batch

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from raysweep.model.linears import Linear
from raysweep.model.structure import Block
from raysweep.pruning.statistics import InputStatistics
from raysweep.reconstruction.placement import ANEW, DEVICE, Placement
from raysweep.reconstruction.stores import Store

Statistics = dict[str, InputStatistics]
"""Of the inputs of a block's input groups, by the group's first linear."""

FEWEST_TOKENS = 32
"""That an expert needs in the calibration set for its statistics to be used: with fewer, the norm of an input (if it is
normal) has a standard error of more than an eighth of itself, 1 / sqrt(2 n)."""


def starved(linear: Linear, block: Block, rows: int) -> bool:
    """Whether a linear is of an expert that too few tokens are routed to. rows: of its inputs"""
    return linear.name in block.routed and rows < FEWEST_TOKENS


def accumulate(statistics: Statistics, name: str, x: Tensor) -> None:
    """Adds one batch of inputs, (..., I), of the linear `name`."""
    x_NI = x.reshape(-1, x.shape[-1])
    if name not in statistics:
        statistics[name] = InputStatistics.empty(x_NI.shape[1], x.device)
    statistics[name].add(x_NI)


def of_linear(statistics: Statistics, block: Block, linear: Linear) -> InputStatistics:
    """Of an expert that no token was routed to, those of no rows."""
    leader = block.leader_of(linear.name)
    if leader not in statistics and linear.name in block.routed:
        return InputStatistics.empty(linear.weight_OI.shape[1], linear.weight_OI.device)
    return statistics[leader]


class DenseStatistics:
    """By text, the statistics of every input group of a range's blocks.

    They are summed up while blocks are watched, in the order of the batches. Then they stay on the device, are put away
    block by block to where they wait, or are given up, and summed up again for a block that asks: in the same order, so
    that the sums are the same. Of those that wait one is in hand at a time, of those that are made again one block's of
    every text.
    """

    def __init__(
        self, placement: Placement, device: torch.device, pass_again: Callable[[str, Block], None]
    ) -> None:
        """pass_again: passes a text through a block as the dense pass does"""
        self._kind, self._device, self._pass_again = placement.statistics, device, pass_again
        self._store = Store(DEVICE if self._kind == ANEW else self._kind, device, placement.scratch)
        self._known: dict[str, Statistics] = {}
        self._rows: dict[tuple[str, str], int] = {}  # of inputs, by text and linear
        self._made: dict[str, Statistics] = {}  # by text, of one block
        self._made_of: int | None = None
        self._in_hand: tuple[str, str, InputStatistics] | None = None

    def watching(self, text: str, block: Block) -> AbstractContextManager[None]:
        """Within the context every batch that passes the block is added."""
        leaders = [] if self._kind == ANEW else block.leaders
        return block.watch_inputs(partial(accumulate, self._known.setdefault(text, {})), leaders)

    def put_away(self, text: str, block: Block) -> None:
        """Once all of a text has passed a block."""
        known = self._known.get(text, {})
        for leader in known.keys() & set(block.leaders):
            known[leader] = known[leader].moved(self._store.put)

    def of(self, text: str, linear: Linear, block: Block) -> InputStatistics:
        """Of the dense inputs of a linear of the block, on the device; of an expert that no token was routed to, those
        of no rows."""
        found = self._found(text, linear, block)
        self._rows[text, linear.name] = found.rows
        return found

    def rows(self, text: str, linear: Linear, block: Block) -> int:
        """How many inputs of a linear they are of."""
        known = self._known.get(text, {}).get(block.leader_of(linear.name))
        if known is not None:
            return known.rows
        if (text, linear.name) not in self._rows:
            self.of(text, linear, block)
        return self._rows[text, linear.name]

    def put_down(self) -> None:
        """What is in hand takes no more room on the device."""
        self.put_down_one()
        self._made.clear()

    def put_down_one(self) -> None:
        """Of what waits elsewhere; what was made again goes on to serve other matrices of its block."""
        self._in_hand = None

    def clear(self) -> None:
        self.put_down()
        self._known.clear()
        self._rows.clear()

    def _found(self, text: str, linear: Linear, block: Block) -> InputStatistics:
        if self._kind == DEVICE:
            return of_linear(self._known[text], block, linear)
        if self._kind == ANEW:
            return of_linear(self._anew(text, block), block, linear)
        leader = block.leader_of(linear.name)
        if self._in_hand is None or self._in_hand[:2] != (text, leader):
            self._in_hand = None  # before another takes its place
            found = of_linear(self._known[text], block, linear)
            self._in_hand = (text, leader, found.moved(lambda tensor: tensor.to(self._device)))
        return self._in_hand[2]

    def _anew(self, text: str, block: Block) -> Statistics:
        if self._made_of != block.index:
            self._made.clear()  # before another's take their place
            self._made_of = block.index
        if text not in self._made:
            known: Statistics = {}
            with block.watch_inputs(partial(accumulate, known), block.leaders):
                self._pass_again(text, block)
            self._made[text] = known
        return self._made[text]
