"""Dense activations at the boundaries of blocks: inputs and targets of every unit, kept for all trials or made anew."""

# S samples, B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from raysweep.model.structure import Block
from raysweep.reconstruction.activations import batches, fetch, keep_rows
from raysweep.reconstruction.placement import MADE, Placement
from raysweep.reconstruction.stores import Store

INPUT, MIDDLE, MLP_OUTPUT = "input", "middle", "mlp output"

Boundary = tuple[str, int]
"""(INPUT, i): what enters block i, and for the index behind the last block what leaves the range;
(MIDDLE, i): what its attention half gives;  (MLP_OUTPUT, i): what the MLP half gives where the two are parallel."""


class Boundaries:
    """What flows at the boundaries of a range of blocks when a text passes through the dense model, each (S, T, H).

    Those that `placement` leaves out are made from the one before whenever they are asked for, in the batches of the
    dense pass and by the same modules: the same numbers.

    halved: whether blocks ran half by half
    """

    def __init__(
        self, blocks: Mapping[int, Block], samples: int, store: Store, placement: Placement, halved: bool
    ) -> None:
        self.samples, self.halved = samples, halved
        self._blocks, self._store, self._placement = blocks, store, placement
        self._first = min(blocks)
        self._kept: dict[Boundary, Tensor] = {}
        self._made: OrderedDict[Boundary, Tensor] = OrderedDict()
        # batches on their way through the dense blocks, by their samples: where they are
        self._in_hand: OrderedDict[tuple[int, int], tuple[int, Tensor]] = OrderedDict()

    @property
    def tokens(self) -> int:
        return self._kept[INPUT, self._first].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in list(self._kept.values()))

    def keeps(self, boundary: Boundary) -> bool:
        """Whether a boundary is one of those that are kept."""
        kind, index = boundary
        whole = (index - self._first) % self._placement.every == 0
        return whole if kind == INPUT else self._placement.halves and self._placement.every == 1

    def write(self, boundary: Boundary, rows: slice, batch_BTH: Tensor) -> None:
        """Takes in a batch of a boundary in the dense pass, if it is one of those that are kept."""
        if self.keeps(boundary):
            keep_rows(self._kept, boundary, self.samples, rows, batch_BTH, self._store)

    def write_all(self, boundary: Boundary, batches_BTH: Iterable[tuple[slice, Tensor]]) -> None:
        """Takes in a whole boundary. One that is not kept is held until others have come."""
        known = self._kept if self.keeps(boundary) else self._made
        for rows, batch_BTH in batches_BTH:
            keep_rows(known, boundary, self.samples, rows, batch_BTH, self._store)
        self._forget_made()

    def get(self, kind: str, index: int) -> Tensor:
        """One boundary of the whole text."""
        boundary = (kind, index)
        if boundary in self._kept:
            return self._kept[boundary]
        if boundary not in self._made:
            self._make(boundary)
        self._made.move_to_end(boundary)
        return self._made[boundary]

    def stored(self, index: int) -> Tensor | None:
        """All of what enters a block, where it is kept or was made."""
        return self._kept.get((INPUT, index), self._made.get((INPUT, index)))

    @torch.no_grad()
    def rows(self, index: int, rows: slice, device: torch.device) -> Tensor:
        """A batch of what enters a block, on the device."""
        if (stored_STH := self.stored(index)) is not None:
            return fetch(stored_STH, rows, device)
        start, hidden_BTH = self._nearest(index, rows, device)
        for passed in range(start, index):
            hidden_BTH = self.through(self._blocks[passed], hidden_BTH)
        if index in self._blocks:  # else nothing goes on from there
            self._in_hand[rows.start, rows.stop] = index, hidden_BTH
        while len(self._in_hand) > self._placement.together:
            self._in_hand.popitem(last=False)
        return hidden_BTH

    def through(self, block: Block, hidden_BTH: Tensor) -> Tensor:
        """A batch through a dense block, as the dense pass takes it."""
        with block.in_hand():
            if not self.halved or block.halves.parallel:
                return block.run(hidden_BTH)
            return block.run(block.run(hidden_BTH, block.halves.attention), block.halves.mlp)

    def _nearest(self, index: int, rows: slice, device: torch.device) -> tuple[int, Tensor]:
        """The last batch that was made, where it is nearer than one that is kept."""
        start = max(at for kind, at in self._kept if kind == INPUT and at <= index)
        at, hidden_BTH = self._in_hand.pop((rows.start, rows.stop), (-1, None))
        if hidden_BTH is not None and start <= at <= index:
            return at, hidden_BTH
        return start, fetch(self._kept[INPUT, start], rows, device)

    @torch.no_grad()
    def _make(self, boundary: Boundary) -> None:
        kind, index = boundary
        if kind != INPUT:
            block, source_STH = self._blocks[index], self.get(INPUT, index)
            half = block.halves.attention if kind == MIDDLE else block.halves.mlp
        else:
            block = self._blocks[index - 1]
            behind_halves = self.halved and not block.halves.parallel
            source_STH = self.get(MIDDLE if behind_halves else INPUT, index - 1)
            half = block.halves.mlp if behind_halves else block.module
        device = self._store.device
        rows = batches(self.samples, source_STH.shape[1], device)
        with block.in_hand():
            self.write_all(
                boundary, ((each, block.run(fetch(source_STH, each, device), half)) for each in rows)
            )

    def _forget_made(self) -> None:
        while len(self._made) > MADE:
            self._made.popitem(last=False)
