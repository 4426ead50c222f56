"""The shard group over Ray: one actor a shard, named, with a queue that serves the oldest trial first."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from raysweep.errors import RaysweepError, ShardLostError, first_line
from raysweep.importing import without_collecting
from raysweep.shards.activity import Account, Activity
from raysweep.shards.group_info import GroupInfo, Ref, ShardSpec
from raysweep.shards.interruption import FINISHING, not_waiting_longer
from raysweep.shards.meter import ShardMeter
from raysweep.shards.peaks import Peaks
from raysweep.shards.priority import PriorityExecutor
from raysweep.shards.shared import POLL_S, Claim, SharedResults, share
from raysweep.shards.trace import Span, Trace

if TYPE_CHECKING:
    from raysweep.shards.worker import ShardWorker

NAMESPACE = "raysweep"
CALLS_AT_ONCE = 256  # that wait at one shard; each holds a thread, none of them works
CONTROL = "control"
LOOK_EVERY_S = 2.0  # for shards that are ready, and nodes that are gone
log = logging.getLogger(__name__)

LOST = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError)


class ShardActor:
    """Serves a ShardWorker, one call at a time, and a table of shared results; made an actor by `start`.

    `run` waits in the queue of trials; the other methods do not, in a concurrency group of their own.
    """

    def __init__(self, spec: ShardSpec, sweep: str, shard: int) -> None:
        """sweep, shard: as its metrics are called"""
        self._queue = PriorityExecutor()
        self._trace, self._account = Trace(spec.traces), Account()
        self._meter = ShardMeter(sweep, shard)
        self._worker = self._queue.submit(0, lambda: self._loaded(spec))
        self._shared = SharedResults()

    def ready(self) -> None:
        """Returns once the blocks are loaded; raises what went wrong, which a constructor could not hand on."""
        self._worker.result()

    def run(self, order: int, label: str, method: str, *arguments: Any) -> Any:
        worker = self._worker.result()

        def call() -> Any:
            said = label or method.replace("_", " ")
            try:
                with self._trace.span(said), self._account.call(said):
                    return getattr(worker, method)(*arguments)
            finally:
                self._meter.note(self._account.read(worker.counts, worker.stored_bytes))

        return self._queue.submit(order, call).result()

    def spans(self) -> list[Span]:
        """Of what it has done, where it notes that."""
        return list(self._trace.spans)

    def activity(self) -> Activity:
        worker = self._worker.result()
        return self._account.read(worker.counts, worker.stored_bytes)

    def peaks(self) -> Peaks:
        found: Peaks = self._worker.result().peaks()
        return found

    def claim(self, key: str, owner: str) -> Claim:
        return self._shared.claim(key, owner)

    def publish(self, key: str, value: Any) -> None:
        self._shared.publish(key, value)

    def abandon(self, owner: str) -> None:
        self._shared.abandon(owner)

    def arrive(self, who: str) -> int:
        return self._shared.arrive(who)

    def forget_shared(self) -> None:
        self._shared.clear()

    def drain(self) -> None:
        """Returns once what is in hand is over and kept. Nothing else is begun any more."""
        self._queue.drain(ShardLostError("the sweep is being ended"))
        self._worker.result().close()

    def _loaded(self, spec: ShardSpec) -> ShardWorker:
        with self._trace.span("load"), without_collecting():
            from raysweep.shards.worker import ShardWorker

            return ShardWorker(spec)


@dataclass(frozen=True)
class Resources:
    """What one shard reserves of its node."""

    num_cpus: float
    num_gpus: float = 0.0


class RayGroup:
    """Handles on the actors of a shard group: made by the driver with `start`, by a trial with `join`.

    What trials of all replicas share lies with the first shard of the first one.
    """

    info: GroupInfo

    def __init__(
        self,
        name: str,
        actors: Sequence[Any],
        info: GroupInfo | None = None,
        first: Any = None,
        others: Sequence[RayGroup] = (),
    ) -> None:
        """first: the first shard of the first replica, where this is another one;  others: replicas that end with it"""
        self.name, self.actors, self._others = name, list(actors), list(others)
        self._first = first or self.actors[0]
        if info is not None:
            self.info = info

    @classmethod
    def start(
        cls, name: str, specs: Sequence[ShardSpec], resources: Resources, timeout_s: float, replicas: int = 1
    ) -> RayGroup:
        """Starts the actors and waits until all have loaded their blocks; returns the first of the replicas.

        Raises ShardLostError when one ends, or a node of the cluster does, RaysweepError when they are not ready after
        `timeout_s`.
        """
        actors: list[Any] = []
        nodes = _living_nodes()
        try:
            for number in range(replicas * len(specs)):
                actors.append(_start_actor(name, number, specs[number % len(specs)], resources))
            each = [actors[start : start + len(specs)] for start in range(0, len(actors), len(specs))]
            group = cls(name, each[0], others=[cls(name, mine, first=actors[0]) for mine in each[1:]])
            group._wait_until_ready(timeout_s, nodes)
        except BaseException:
            for actor in actors:
                ray.kill(actor)
            raise
        return group

    @classmethod
    def join(cls, name: str, info: GroupInfo, replica: int = 0) -> RayGroup:
        """One of the groups of that name, from any process of the same Ray cluster."""
        numbers = range(replica * info.shards, (replica + 1) * info.shards)
        first, *actors = (ray.get_actor(_actor_name(f"{name}/{k}"), NAMESPACE) for k in (0, *numbers))
        return cls(name, actors, info, first)

    @property
    def shards(self) -> int:
        return len(self.actors)

    @property
    def replicas(self) -> list[RayGroup]:
        return [self, *self._others]

    @property
    def _everything(self) -> list[Any]:
        """The actors of all replicas; a shard's number is its place here."""
        return [actor for replica in self.replicas for actor in replica.actors]

    def submit(self, shard: int, order: int, method: str, *arguments: Any, label: str = "") -> Ref:
        run = self.actors[shard].run
        return (run.options(name=label) if label else run).remote(order, label, method, *arguments)

    def result(self, ref: Ref) -> Any:
        try:
            return ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from error
        except LOST as error:
            raise ShardLostError(
                f"a shard's process ended before its work did: {first_line(error)}"
            ) from error

    def is_there(self, ref: Ref) -> bool:
        return bool(ray.wait([ref], timeout=0, fetch_local=False)[0])

    def settle(self, refs: list[Ref]) -> None:
        if refs:
            ray.wait(refs, num_returns=len(refs), fetch_local=False)

    def first_done(self, refs: list[Ref]) -> int:
        done, _ = ray.wait(refs, num_returns=1)
        return refs.index(done[0])

    def share(self, key: str, owner: str, make: Callable[[], Any], everywhere: bool = True) -> Any:
        table = self._first if everywhere else self.actors[0]

        def call(method: str) -> Callable[..., Any]:
            return lambda *arguments: self.result(getattr(table, method).remote(*arguments))

        return share(key, owner, make, call("claim"), call("publish"), call("abandon"))

    def arrive(self, who: str) -> int:
        """Says that a process of trials is here; returns how many are."""
        return int(self.result(self._first.arrive.remote(who)))

    def wait_for_others(self, who: str, number: int, timeout_s: float) -> None:
        """Waits until so many processes have come here, each under a name of its own, or for `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.arrive(who) < number and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def forget_shared(self) -> None:
        for replica in self.replicas:
            self.result(replica.actors[0].forget_shared.remote())

    def forget_trial(self, trial_id: str, order: int) -> None:
        """Asks only, and waits for nothing: a shard may be gone as well."""
        for replica in self.replicas:
            replica.actors[0].abandon.remote(trial_id)
            for shard in range(self.shards):
                replica.submit(shard, order, "release", trial_id, label=f"{trial_id}: forget")

    def portable(self, own_criteria: Mapping[str, Any]) -> dict[str, Any]:
        """Functions are sent as code, not as names of modules that other nodes may not have."""
        for module in map(inspect.getmodule, filter(callable, own_criteria.values())):
            if module is not None:
                ray.cloudpickle.register_pickle_by_value(module)
        return dict(own_criteria)

    def check(self) -> None:
        for actor in self._everything:
            self.result(actor.ready.remote())

    def spans(self) -> list[list[Span]]:
        return [self.result(actor.spans.remote()) for actor in self._everything]

    def activities(self) -> list[Activity]:
        return [self.result(ref) for ref in [actor.activity.remote() for actor in self._everything]]

    def peaks(self) -> list[Peaks]:
        return [self.result(ref) for ref in [actor.peaks.remote() for actor in self._everything]]

    def close(self) -> None:
        """Ends the actors of all replicas. Closing twice does no harm."""
        for actor in self._everything:
            ray.kill(actor)
        for replica in self.replicas:
            replica.actors.clear()

    def __enter__(self) -> RayGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an interruption once what the shards have in hand is over; another one ends them now."""
        try:
            if kind is not None and issubclass(kind, KeyboardInterrupt):
                with not_waiting_longer():
                    log.warning(FINISHING)
                    self.settle([actor.drain.remote() for actor in self._everything])
        finally:
            self.close()

    def _wait_until_ready(self, timeout_s: float, nodes: set[str]) -> None:
        """nodes: of the cluster, on which the shards may lie"""
        missing = [actor.ready.remote() for actor in self._everything]
        shards, deadline = len(missing), time.monotonic() + timeout_s
        while missing and time.monotonic() < deadline:
            ready, missing = ray.wait(missing, num_returns=len(missing), timeout=LOOK_EVERY_S)
            for ref in ready:
                self.result(ref)
            if missing and not nodes <= _living_nodes():  # whoever waits for a place there waits for ever
                raise ShardLostError("a node left the cluster while shards were starting")
        if missing:
            free = ray.available_resources()
            raise RaysweepError(
                f"{len(missing)} of {shards} shards are not ready after {timeout_s:.0f} s; free: "
                f"{free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs. Lower execution.shards or "
                "execution.replicas, or free some."
            )


def _living_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _start_actor(group: str, shard: int, spec: ShardSpec, resources: Resources) -> Any:
    with_groups: Any = ray.remote(concurrency_groups={CONTROL: 4})  # type: ignore[call-overload]
    actor_class = with_groups(_with_control_methods(ShardActor))
    return actor_class.options(
        name=_actor_name(f"{group}/{shard}"),
        namespace=NAMESPACE,
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        max_concurrency=CALLS_AT_ONCE,
    ).remote(spec, group.partition("/")[0], shard)


def _with_control_methods(cls: type[ShardActor]) -> type[ShardActor]:
    """Marks the methods that do not queue behind the calls of trials. Here, so that the class itself knows nothing of
    actors' options."""
    for method in (
        "claim",
        "publish",
        "abandon",
        "arrive",
        "forget_shared",
        "spans",
        "activity",
        "peaks",
        "drain",
    ):
        ray.method(concurrency_group=CONTROL)(getattr(cls, method))
    return cls


def _actor_name(name: str) -> str:
    return f"raysweep/{name}"


def _cause(error: ray.exceptions.RayTaskError) -> Exception:
    """The error of ours that a worker raised, or one that says what it raised."""
    cause = error.cause
    if isinstance(cause, RaysweepError):
        return cause
    if isinstance(cause, LOST):  # of the shard that a call waited for
        return ShardLostError(f"a shard's process ended before its work did: {first_line(cause)}")
    return RaysweepError(f"a shard failed: {type(cause).__name__}: {cause}")
