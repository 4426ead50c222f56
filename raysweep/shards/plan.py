"""Where the blocks go: how many shards, which blocks each, what they reserve, and whether that fits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise

from raysweep.cluster.nodes import Node
from raysweep.errors import CapacityError
from raysweep.model.shape import ModelShape
from raysweep.reconstruction.placement import DEVICE, Placement
from raysweep.shards.memory import SIZES, ShardMemory, Workload, keepable_bytes, shard_memory
from raysweep.shards.stores import AUTO, Stores

TRIALS_IN_FLIGHT = 3  # one trains, another is evaluated, a third begins; each is a process of its own
CPUS_FOR_TRIALS = 0.1  # of every node, that no shard reserves: room for the processes of trials
LEAST_CPUS = 0.01  # that a shard reserves where no node has a core to speak of
KNOWLEDGE_MARGIN = 16 << 20  # for the small things that are kept beside masks, inputs and factors; assumption
# Of the memory that nobody needs, for inputs of linears and factors; assumption: other programs want some.
SPARE_SHARE = 0.5
USED_SHARE = 0.92  # of a GPU's memory: libraries, and gaps between tensors, take the rest; assumption
STORE_SHARE = 0.7  # of a GPU's memory, within which all must fit for activations to be kept there; assumption


@dataclass(frozen=True)
class ShardPlan:
    """ranges: blocks (start, stop) by shard;  device: cpu or cuda;  cpus, gpus: that one shard reserves
    replicas: groups of such shards;  concurrent_trials: in flight in each of them
    memory: by shard, with what it may keep;  shares_cores: more shards than cores
    knowledge_bytes: limit of the masks, inputs of linears and factors that one shard keeps
    placement: where a shard's things lie while they are not in hand;  compiles: whether training on a device is
    shares_head: whether both ends of the chain have the head and take turns: on CPUs, where it is worth several blocks,
    and fits twice; a GPU is done with it before hidden states would have left for another one
    spans: whether units reach over several shards
    """

    ranges: tuple[tuple[int, int], ...]
    device: str
    dtype: str
    cpus: float
    gpus: float
    threads: int
    concurrent_trials: int
    memory: tuple[ShardMemory, ...]
    knowledge_bytes: int
    shares_cores: bool
    placement: Placement = field(default_factory=Placement)
    compiles: bool = False
    shares_head: bool = False
    replicas: int = 1
    spans: bool = False

    @property
    def stored_on_device(self) -> bool:
        """Whether activations are kept on the device."""
        return self.placement.activations == DEVICE

    @property
    def shards(self) -> int:
        """Of one replica."""
        return len(self.ranges)

    @property
    def all_shards(self) -> int:
        return self.replicas * self.shards

    @property
    def all_concurrent_trials(self) -> int:
        return self.replicas * self.concurrent_trials

    @property
    def heads(self) -> frozenset[int]:
        """Shards that have the last norm and the head."""
        return frozenset({0, self.shards - 1} if self.shares_head else {self.shards - 1})


def even_ranges(blocks: int, shards: int) -> tuple[tuple[int, int], ...]:
    """Contiguous ranges as equal as can be. The last shards, of which one holds the head, get the smaller ones."""
    size, larger = divmod(blocks, shards)
    ends = [0]
    for shard in range(shards):
        ends.append(ends[-1] + size + (shard < larger))
    return tuple(pairwise(ends))


def make_plan(
    model: ModelShape,
    nodes: Sequence[Node],
    work: Workload,
    dtype: str,
    shards: int | None = None,
    threads: int = 1,
    concurrent_trials: int | None = None,
    stores: Stores | None = None,
    compiles: bool = False,
    replicas: int = 1,
) -> ShardPlan:
    """The plan for a model on these nodes. None leaves a choice to the plan: as many shards as there are places, or as
    many fewer as fit (each is a process with libraries of its own), and three trials in flight, or fewer.

    shards, concurrent_trials: in each of the replicas
    stores: where things may lie, anywhere by default;  compiles: training on a device
    Raises CapacityError.
    """
    device = "cuda" if any(node.gpus for node in nodes) else "cpu"
    wanted = 1.0 if device == "cuda" else float(threads)
    places = sum(node.gpus for node in nodes) if device == "cuda" else _places(nodes, wanted, device)
    most = _shard_count(model, shards, max(1, places // replicas))
    if device == "cuda" and most * replicas > places:
        raise CapacityError(
            (f"{replicas} replicas of " if replicas > 1 else "")
            + f"{most} shard{'s' * (most > 1)} need {most * replicas} GPUs, and there are {places}",
            remedy="Lower execution.shards" + (" or execution.replicas." if replicas > 1 else "."),
        )

    def with_shards(count: int, placement: Placement) -> ShardPlan:
        if device == "cpu" and count > 1:
            with suppress(CapacityError):
                return with_heads(count, placement, shared=True)
        return with_heads(count, placement, shared=False)

    def with_heads(count: int, placement: Placement, shared: bool) -> ShardPlan:
        plan = ShardPlan(
            ranges=even_ranges(len(model.blocks), count),
            device=device,
            dtype=dtype,
            cpus=_reserved_cpus(nodes, count * replicas, wanted, device),
            gpus=1.0 if device == "cuda" else 0.0,
            threads=threads,
            concurrent_trials=concurrent_trials or TRIALS_IN_FLIGHT,
            memory=(),
            knowledge_bytes=0,
            shares_cores=device == "cpu" and count * replicas > places,
            compiles=compiles and device == "cuda",
            shares_head=shared,
            replicas=replicas,
            placement=placement,
            spans=work.span > 1 and count > 1,
        )
        fewer = concurrent_trials is None and not shared  # trials in flight are worth more than a second head
        if plan.stored_on_device and (stores is None or stores.activations == AUTO):
            roomy = [replace(node, gpu_bytes=int(node.gpu_bytes * STORE_SHARE)) for node in nodes]
            return _with_memory(plan, model, roomy, work, fewer=False)
        return _with_memory(plan, model, nodes, work, fewer)

    refused: CapacityError | None = None
    for placement in (stores or Stores()).placements(device):
        for count in (most,) if shards is not None else range(most, 0, -1):
            try:
                return with_shards(count, placement)
            except CapacityError as error:
                refused = error
    raise refused or CapacityError(
        "no placement is left", allowed="other values of execution.weight_store and its neighbours"
    )


def _shard_count(model: ModelShape, wanted: int | None, automatic: int) -> int:
    blocks = len(model.blocks)
    if wanted is not None and wanted > blocks:
        raise CapacityError(
            f"execution.shards is {wanted}, but the model has {blocks} blocks",
            allowed=f"1 to {blocks}, or auto",
        )
    return wanted if wanted is not None else min(blocks, automatic)


def _places(nodes: Sequence[Node], cpus: float, device: str) -> int:
    """How many shards of so many CPUs the nodes hold. A shard lies on one node."""
    each = (int(node.cpus / cpus + 1e-9) for node in nodes)
    if device == "cuda":
        return sum(min(node.gpus, fitting) for node, fitting in zip(nodes, each, strict=True))
    return sum(each)


def _reserved_cpus(nodes: Sequence[Node], shards: int, wanted: float, device: str) -> float:
    """The most CPUs up to `wanted` that every shard can reserve, when each node keeps a sliver for trials."""
    usable = [replace(node, cpus=max(0.0, node.cpus - CPUS_FOR_TRIALS)) for node in nodes]
    whole = range(int(wanted), 0, -1)  # Ray takes whole CPUs above one
    parts = {int(node.cpus / count * 100) / 100 for node in usable for count in range(1, shards + 1)}
    for cpus in (*map(float, whole), *sorted((part for part in parts if 0 < part < 1), reverse=True)):
        if _places(usable, cpus, device) >= shards:
            return cpus
    return LEAST_CPUS


def _with_memory(
    plan: ShardPlan, model: ModelShape, nodes: Sequence[Node], work: Workload, fewer: bool
) -> ShardPlan:
    """The plan with its memory; `fewer`: with as many fewer trials in flight as it takes to fit."""
    most = plan.concurrent_trials if work.most_trials is None else work.most_trials
    work = replace(work, concurrent_trials=min(plan.concurrent_trials, most))
    shards = (
        shard_memory(model, *blocks, plan.dtype, work, shard in plan.heads, plan.placement, plan.device)
        for shard, blocks in enumerate(plan.ranges)
    )
    least = replace(plan, memory=tuple(shards))
    try:
        _check_fit(least, nodes)
    except CapacityError:
        if not fewer or plan.concurrent_trials == 1:
            raise
        return _with_memory(
            replace(plan, concurrent_trials=plan.concurrent_trials - 1), model, nodes, work, fewer
        )
    return _with_knowledge(least, model, nodes, work)


def _with_knowledge(plan: ShardPlan, model: ModelShape, nodes: Sequence[Node], work: Workload) -> ShardPlan:
    """Lets shards keep more inputs and factors than one block's where memory is left."""
    keepable = [
        keepable_bytes(model.blocks[start:stop], SIZES[plan.dtype], work) for start, stop in plan.ranges
    ]
    totals = [[block.total for block in mine] for mine in keepable]
    everything, least = max(map(sum, totals)), max(map(max, totals))
    kept = everything
    if plan.stored_on_device and work.inputs and (largest := _least_gpu(nodes)):
        spare = max(0, largest - max(memory.device for memory in plan.memory))
        kept = min(kept, least + int(SPARE_SHARE * spare))
    there = sum(node.memory_bytes for node in nodes)
    if there and (work.factors or not plan.stored_on_device):
        spare = max(0, there - host_bytes(plan)) // plan.all_shards
        kept = min(kept, least + int(SPARE_SHARE * spare))
    return replace(
        plan,
        memory=tuple(memory.keeping(kept, mine) for memory, mine in zip(plan.memory, keepable, strict=True)),
        knowledge_bytes=max(memory.known_masks for memory in plan.memory) + kept + KNOWLEDGE_MARGIN,
    )


def host_bytes(plan: ShardPlan) -> int:
    """Host memory of all shards: on a CPU also what a device would hold."""
    return plan.replicas * sum(_host_bytes(plan, memory) for memory in plan.memory)


def host_bytes_in_one_process(plan: ShardPlan) -> int:
    """The same of a process that holds all shards. It does one thing at a time, but all parts of a unit are open."""
    passing = [(memory.at_work + memory.heap) * (plan.device == "cpu") for memory in plan.memory]
    lasting = [
        _host_bytes(plan, memory) - memory.process - at_work
        for memory, at_work in zip(plan.memory, passing, strict=True)
    ]
    return (
        max(memory.process for memory in plan.memory) + sum(lasting) + (sum if plan.spans else max)(passing)
    )


def _host_bytes(plan: ShardPlan, memory: ShardMemory) -> int:
    return memory.host if plan.device == "cuda" else memory.total


def _check_fit(plan: ShardPlan, nodes: Sequence[Node]) -> None:
    if plan.device == "cuda":
        _check_bytes(
            "of device memory",
            max(memory.device for memory in plan.memory),
            _least_gpu(nodes),
        )
    _check_bytes("of host memory", host_bytes(plan), sum(node.memory_bytes for node in nodes))
    largest = max(_host_bytes(plan, memory) for memory in plan.memory)
    _check_bytes("of host memory on one node", largest, max(node.memory_bytes for node in nodes))


def _least_gpu(nodes: Sequence[Node]) -> int:
    """What tensors may take of the smallest one; 0 = unknown."""
    return int(USED_SHARE * min(node.gpu_bytes for node in nodes if node.gpus))


def _check_bytes(kind: str, needed: int, there: int) -> None:
    if there and needed > there:
        fewer = "fewer shards or replicas"
        more = f"Use more or larger nodes, {fewer}" if kind == "of host memory" else "Use more shards"
        raise CapacityError(
            f"the sweep needs {format_bytes(needed)} {kind}, and there are {format_bytes(there)}",
            remedy=f"{more}, lower execution.concurrent_trials or calibration.num_samples, or choose a smaller dtype.",
        )


def format_bytes(count: float) -> str:
    """As people read it: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
