"""What a trial must know of a shard group to run through it. No torch, so that trials start fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from raysweep.reconstruction.placement import Placement

EVALUATION_PREFIX = "evaluation/"
TRIAL_CPUS = 0.01  # that a trial's process reserves: it waits for the shards nearly all of its time


@dataclass(frozen=True)
class ShardSpec:
    """Everything that a worker needs to find its part of the model by itself, also after a restart.

    start, stop: its blocks;  head: whether it has the head though it is not the last
    dtype: resolved;  device: cpu or cuda;  threads: of the CPU, for one operation
    knowledge_bytes: how much of what it has worked out it may keep
    placement: where what it holds lies;  compiles: whether it compiles training on its device
    traces: whether it notes what it does when
    """

    model_path: str
    revision: str | None
    trust_remote_code: bool
    dtype: str
    start: int
    stop: int
    head: bool = False
    device: str = "cpu"
    threads: int = 1
    knowledge_bytes: int = 2 << 30
    placement: Placement = field(default_factory=Placement)
    compiles: bool = False
    traces: bool = False


@dataclass(frozen=True)
class TextInfo:
    """A text that passes through the chain: its batches as (start, stop) of samples, and tokens of a sample."""

    name: str
    batches: tuple[tuple[int, int], ...]
    tokens: int

    @property
    def samples(self) -> int:
        return self.batches[-1][1]


@dataclass(frozen=True)
class UnitSpan:
    """A unit and the blocks (start, stop) that it is in."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class GroupInfo:
    """A shard group as its trials see it.

    ranges: blocks (start, stop) of every shard;  heads: shards with the head, whose turn it is batch by batch
    units: by granularity, in the order of the model
    texts: by name; those that are kept (calibration, validation) and those that are evaluated on
    versions: columns with those of the libraries that compute
    together: batches that an evaluation sends as one, as of `Placement`
    """

    ranges: tuple[tuple[int, int], ...]
    units: Mapping[str, tuple[UnitSpan, ...]]
    texts: Mapping[str, TextInfo]
    device_name: str
    prunable: Mapping[str, int]
    heads: tuple[int, ...]
    versions: Mapping[str, str]
    together: int = 1

    @property
    def shards(self) -> int:
        return len(self.ranges)

    @property
    def blocks(self) -> int:
        return self.ranges[-1][1]

    def shard_of(self, block: int) -> int:
        """The shard that holds a block."""
        return next(shard for shard, (start, stop) in enumerate(self.ranges) if start <= block < stop)

    def shards_of(self, unit: UnitSpan) -> range:
        """The shards that a unit reaches over."""
        return range(self.shard_of(unit.start), self.shard_of(unit.stop - 1) + 1)


Ref = Any
"""A result that may not be there yet; may be handed to `submit` as an argument without waiting for it."""


class ShardGroup(Protocol):
    """How trials reach the shards, over Ray or in process: the same calls, the same numbers."""

    info: GroupInfo

    def submit(self, shard: int, order: int, method: str, *arguments: Any, label: str = "") -> Ref:
        """Calls `method` of a worker; of waiting calls the one with the lowest `order` runs first."""
        ...

    def result(self, ref: Ref) -> Any:
        """Waits for a result. Raises what the call raised."""
        ...

    def is_there(self, ref: Ref) -> bool:
        """Whether a result, or what the call raised, can be had without waiting."""
        ...

    def settle(self, refs: list[Ref]) -> None:
        """Waits until all of `refs` are done or have failed, without taking their results."""
        ...

    def first_done(self, refs: list[Ref]) -> int:
        """Position in `refs` of a result that is there, waiting until one is."""
        ...

    def share(self, key: str, owner: str, make: Callable[[], Any], everywhere: bool = True) -> Any:
        """The value of `key`, made by the first trial that asks, while the others wait for it.

        everywhere: for trials of all replicas; else for those of this group, whose shards keep what `make` leaves there
        """
        ...
