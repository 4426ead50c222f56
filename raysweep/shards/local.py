"""The shard group's twin in one process: the same workers and trials without Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysweep.shards.activity import Account, Activity
from raysweep.shards.group_info import GroupInfo, Ref, ShardSpec
from raysweep.shards.interruption import finishing_first
from raysweep.shards.peaks import Peaks
from raysweep.shards.shared import SharedResults, share
from raysweep.shards.trace import Span, Trace
from raysweep.shards.worker import ShardWorker


@dataclass(frozen=True, eq=False)
class _Done:
    """What a call returned, or raised."""

    value: Any
    error: Exception | None = None


class LocalGroup:
    """Every call runs at once, in the caller's thread; what it raises is raised where its result is taken."""

    info: GroupInfo
    name = "in process"

    def __init__(self, specs: Sequence[ShardSpec]) -> None:
        self._traces = [Trace(spec.traces) for spec in specs]
        self._accounts = [Account() for _ in specs]
        self.workers = [self._loaded(shard, spec) for shard, spec in enumerate(specs)]
        self.shared = SharedResults()

    @property
    def shards(self) -> int:
        return len(self.workers)

    @property
    def replicas(self) -> tuple[LocalGroup]:
        return (self,)

    def submit(self, shard: int, order: int, method: str, *arguments: Any, label: str = "") -> Ref:
        try:
            ready = [self.result(each) if isinstance(each, _Done) else each for each in arguments]
            label = label or method.replace("_", " ")
            with finishing_first(), self._traces[shard].span(label), self._accounts[shard].call(label):
                return _Done(getattr(self.workers[shard], method)(*ready))
        except Exception as error:  # kept for `result`, as a call over Ray keeps it
            return _Done(None, error)

    def result(self, ref: Ref) -> Any:
        if ref.error is not None:
            raise ref.error
        return ref.value

    def is_there(self, ref: Ref) -> bool:
        return True

    def settle(self, refs: list[Ref]) -> None:
        """Nothing: every call is done when it has been submitted."""

    def first_done(self, refs: list[Ref]) -> int:
        return 0

    def share(self, key: str, owner: str, make: Callable[[], Any], everywhere: bool = True) -> Any:
        return share(key, owner, make, self.shared.claim, self.shared.publish, self.shared.abandon)

    def forget_shared(self) -> None:
        self.shared.clear()

    def forget_trial(self, trial_id: str, order: int) -> None:
        self.shared.abandon(trial_id)
        for shard in range(self.shards):
            self.submit(shard, order, "release", trial_id)

    def portable(self, own_criteria: Mapping[str, Any]) -> dict[str, Any]:
        return dict(own_criteria)

    def check(self) -> None:
        """Nothing: shards end with this process."""

    def spans(self) -> list[list[Span]]:
        """By shard, what it has done."""
        return [list(trace.spans) for trace in self._traces]

    def activities(self) -> list[Activity]:
        both = zip(self._accounts, self.workers, strict=False)  # closing takes the workers away
        return [account.read(worker.counts, worker.stored_bytes) for account, worker in both]

    def peaks(self) -> list[Peaks]:
        """All of this one process."""
        return [worker.peaks() for worker in self.workers]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.workers.clear()

    def _loaded(self, shard: int, spec: ShardSpec) -> ShardWorker:
        with self._traces[shard].span("load"):
            return ShardWorker(spec)

    def __enter__(self) -> LocalGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
