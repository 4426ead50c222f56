"""The shard group's twin in one process: the same workers and trials without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from raysweep.shards.group_info import GroupInfo, Ref, ShardSpec
from raysweep.shards.shared import SharedResults, share
from raysweep.shards.worker import ShardWorker


class LocalGroup:
    """Every call runs at once, in the caller's thread."""

    info: GroupInfo
    name = "in process"

    def __init__(self, specs: Sequence[ShardSpec]) -> None:
        self.workers = [ShardWorker(spec) for spec in specs]
        self.shared = SharedResults()

    @property
    def shards(self) -> int:
        return len(self.workers)

    def submit(self, shard: int, order: int, method: str, *arguments: Any, label: str = "") -> Ref:
        return getattr(self.workers[shard], method)(*arguments)

    def result(self, ref: Ref) -> Any:
        return ref

    def first_done(self, refs: list[Ref]) -> int:
        return 0

    def share(self, key: str, owner: str, make: Callable[[], Any]) -> Any:
        return share(key, owner, make, self.shared.claim, self.shared.publish, self.shared.abandon)

    def forget_shared(self) -> None:
        self.shared.clear()

    def close(self) -> None:
        self.workers.clear()

    def __enter__(self) -> LocalGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
