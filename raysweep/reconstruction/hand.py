"""The blocks in hand: their tensors lie on the device, while those of others wait where their stores keep them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raysweep.model.shard import ModelShard
from raysweep.model.structure import Block
from raysweep.reconstruction.graphs import sending
from raysweep.reconstruction.heap import give_back
from raysweep.reconstruction.placement import HOST
from raysweep.reconstruction.stores import Store

# of weights that come and go before the heap is given back: that takes milliseconds, and until then the heap grows
GIVE_BACK_BYTES = 16 << 20

Tensors = dict[str, Tensor]
"""By full name of a parameter."""


class WaitingWeights:
    """Dense weights of blocks that are not in hand: read when they are first needed, or shortly before, by a thread.

    On the host they stay, page-locked beside a GPU; else they are read again from the model's files, of which the
    system remembers what it has memory for.
    """

    def __init__(self, shard: ModelShard, kind: str) -> None:
        self._shard, self._stays = shard, kind == HOST
        self._store = Store(HOST, shard.device)
        self._known: dict[int, Tensors] = {}
        self._coming: dict[int, list[tuple[frozenset[str], Future[Tensors]]]] = {}
        self._reader = ThreadPoolExecutor(1, "weights")

    def begin(self, index: int, names: frozenset[str]) -> None:
        """Has tensors of a block read that will be needed next, and gives up what was read ahead of another one."""
        if index in self._known:
            return
        for other in [at for at in self._coming if at != index]:
            for _, future in self._coming.pop(other):
                future.cancel()
        coming = self._coming.setdefault(index, [])
        if missing := names.difference(*(there for there, _ in coming)):
            coming.append((missing, self._reader.submit(self._read, index, missing)))

    def take(self, index: int, names: frozenset[str]) -> Tensors:
        """Tensors of a block on the host."""
        self.begin(index, names)
        if index in self._known:
            return {name: self._known[index][name] for name in names}
        read: Tensors = {}
        for _, future in self._coming.pop(index):
            read |= future.result()
        return {name: read[name] for name in names}

    def knows(self, index: int) -> bool:
        """Whether the block's tensors lie on the host."""
        return index in self._known

    def _read(self, index: int, names: frozenset[str]) -> Tensors:
        """In the thread alone."""
        if index in self._known:
            return {name: self._known[index][name] for name in names}
        if not self._stays:
            return self._shard.read_block(index, names)
        read = self._shard.read_block(index)
        if self._shard.device.type == "cuda":
            read = {name: self._store.empty(t.shape, t.dtype).copy_(t) for name, t in read.items()}
        self._known[index] = read
        return {name: read[name] for name in names}


@dataclass
class _Held:
    """A block whose tensors lie on the device.

    names: of its parameters;  dense: those of its dense tensors that were needed
    copies: of a trial's tensors, by trial and name: what waits, and what was made of it on the device
    users: how many work with it;  arrived: when what was sent ahead is there
    """

    names: frozenset[str]
    dense: Tensors = field(default_factory=dict)
    copies: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    users: int = 0
    arrived: torch.cuda.Event | None = None


class Hand:
    """Takes blocks in hand, with their dense weights or a trial's: those at work, and the one that comes next.

    While a block is in hand a trial's tensors of it lie on the device in the place of those that wait. Unless training
    has `changed` them, those that wait come back into their place, and nothing is copied.
    """

    def __init__(self, waiting: WaitingWeights, trials: Mapping[str, Tensors], store: Store) -> None:
        """trials: weights by trial, changed in place;  store: where they wait"""
        self._waiting, self._trials, self._store = waiting, trials, store
        self._device = store.device
        self._held: dict[int, _Held] = {}
        self._put: dict[tuple[str, str], Tensor] = {}  # what waits in the store, by trial and name
        self._nonzeros: dict[tuple[str, str], Tensor] = {}  # counted where they were, int64 ()
        self._passed_by = 0  # bytes of blocks that have left the hand since the heap was last given back

    @contextmanager
    def hold(self, name: str | None, block: Block, following: Block) -> Iterator[Tensors]:
        """The block's tensors on the device within the context: the trial's, and dense ones where it has none.

        following: the block that is sent ahead meanwhile
        """
        held = self._at_hand(block)
        held.users += 1
        try:
            self._put_away_but({block.index, following.index})
            self._bring(name, block, held)
            if following is not block and held.users == 1:  # else whoever holds it as well has sent it
                self._send_ahead(name, following)
            own = self._own(name, block)
            yield {full: own[full] if full in own else held.dense[full] for full in block.parameter_names}
        finally:
            held.users -= 1

    def changed(self, name: str, block: Block) -> None:
        """The trial's tensors of the block are no longer what waits, or what was counted of it."""
        held = self._held.get(block.index)
        if held is not None:
            held.copies = {key: pair for key, pair in held.copies.items() if key[0] != name}
        for full in block.parameter_names:
            self._put.pop((name, full), None)
            self._nonzeros.pop((name, full), None)

    def forget(self, name: str) -> None:
        """Before a trial's weights are dropped."""
        for held in self._held.values():
            if any(key[0] == name for key in held.copies):
                self._await(held)  # what is on its way must not meet what takes its memory
            held.copies = {key: pair for key, pair in held.copies.items() if key[0] != name}
        for counted in (self._put, self._nonzeros):
            for key in [key for key in counted if key[0] == name]:
                del counted[key]

    def zeros(self, name: str, full: str) -> int | None:
        """Among a trial's tensor that waits as it was put away; None for another."""
        tensor = self._trials[name][full]
        if self._put.get((name, full)) is not tensor:
            return None
        return tensor.numel() - int(self._nonzeros[name, full])

    def _at_hand(self, block: Block) -> _Held:
        return self._held.setdefault(block.index, _Held(frozenset(block.parameter_names)))

    def _own(self, name: str | None, block: Block) -> Tensors:
        weights = self._trials[name] if name is not None else {}
        return {full: weights[full] for full in block.parameter_names if full in weights}

    def _lacking(self, name: str | None, block: Block, held: _Held) -> frozenset[str]:
        """Names of the dense tensors that must still be brought."""
        there = self._own(name, block).keys() | held.dense.keys()
        return frozenset(full for full in block.parameter_names if full not in there)

    def _bring(self, name: str | None, block: Block, held: _Held) -> None:
        self._await(held)
        if lacking := self._lacking(name, block, held):
            held.dense |= self._copied(self._waiting.take(block.index, lacking))
        waits = self._waiting_of(name, block)
        self._replace(name, held, waits, self._copied(waits))

    def _send_ahead(self, name: str | None, block: Block) -> None:
        """On a stream of its own what lies on the host; has the rest read."""
        held = self._held.get(block.index) or _Held(frozenset())
        lacking = self._lacking(name, block, held)
        known = self._device.type == "cuda" and self._waiting.knows(block.index)
        if lacking and not known:
            self._waiting.begin(block.index, lacking)
        if self._device.type == "cpu":
            return
        held = self._at_hand(block)
        dense = self._waiting.take(block.index, lacking) if lacking and known else {}
        waits = self._waiting_of(name, block)
        held.dense |= self._sent(held, dense)
        self._replace(name, held, waits, self._sent(held, waits))

    def _sent(self, held: _Held, tensors: Tensors) -> Tensors:
        """Copies on their way to the device. Nobody knows of them before all are: what finds no room leaves nothing."""
        if not tensors:
            return {}
        there = {full: torch.empty_like(tensor, device=self._device) for full, tensor in tensors.items()}
        self._await(held)
        with sending(self._device, "weights") as arrived:
            for full, tensor in tensors.items():
                there[full].copy_(tensor, non_blocking=True)
        held.arrived = arrived
        return there

    def _waiting_of(self, name: str | None, block: Block) -> Tensors:
        """The trial's tensors of the block that wait elsewhere."""
        return {full: t for full, t in self._own(name, block).items() if t.device != self._device}

    def _replace(self, name: str | None, held: _Held, waits: Tensors, copies: Tensors) -> None:
        """Puts copies on the device in the place of the trial's tensors that wait."""
        for full, copy in copies.items():
            if name is not None:
                held.copies[name, full] = (waits[full], copy)
                self._trials[name][full] = copy

    def _copied(self, tensors: Tensors) -> Tensors:
        return {full: tensor.to(self._device, non_blocking=True) for full, tensor in tensors.items()}

    def _await(self, held: _Held) -> None:
        if held.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(held.arrived)
            held.arrived = None

    def _put_away_but(self, stay: set[int]) -> None:
        """Puts away all blocks that nobody works with, but for those that stay."""
        for index in [index for index, held in self._held.items() if not held.users and index not in stay]:
            self._put_block_away(index)
        # a block that comes may not fit into the holes of the one that went
        if self._passed_by >= GIVE_BACK_BYTES:
            self._passed_by = 0
            give_back()

    def _put_block_away(self, index: int) -> None:
        held = self._held[index]
        self._await(held)  # what is on its way must not meet what takes its memory
        for name, weights in self._trials.items():
            for full in held.names & weights.keys():
                key, tensor = (name, full), weights[full]
                waits, copy = held.copies.get(key, (None, None))
                if copy is tensor and waits is not None:
                    weights[full] = waits
                elif self._put.get(key) is not tensor:
                    nonzeros, there = tensor.count_nonzero(), self._store.put(tensor)
                    weights[full] = self._put[key] = there
                    self._nonzeros[key] = nonzeros
                self._passed_by += tensor.nbytes
        del self._held[index]
        self._passed_by += sum(tensor.nbytes for tensor in held.dense.values())
