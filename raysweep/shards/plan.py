"""Where the blocks go: how many shards, which blocks each, what they reserve, and whether that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from raysweep.cluster.nodes import Node
from raysweep.errors import CapacityError
from raysweep.model.shape import ModelShape
from raysweep.shards.memory import SIZES, ShardMemory, Workload, knowledge_bytes, shard_memory

TRIALS_IN_FLIGHT = 3  # one is trained while another is evaluated and a third begins; each is a process of its own
KNOWLEDGE_MARGIN = 256 << 20  # for the small things that are kept beside masks


@dataclass(frozen=True)
class ShardPlan:
    """ranges: blocks (start, stop) by shard;  device: cpu or cuda;  cpus, gpus: that one shard reserves
    memory: by shard;  shares_cores: more shards than cores
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

    @property
    def shards(self) -> int:
        return len(self.ranges)


def even_ranges(blocks: int, shards: int) -> tuple[tuple[int, int], ...]:
    """Contiguous ranges as equal as can be. The last shards, which also hold the head, get the smaller ones."""
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
) -> ShardPlan:
    """The plan for a model on these nodes. None leaves a choice to the plan. Raises CapacityError."""
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    device = "cuda" if gpus else "cpu"
    count = _shard_count(model, shards, gpus if gpus else max(1, int(cpus) // threads))
    if device == "cuda" and count > gpus:
        raise CapacityError(
            f"{count} shards need {count} GPUs, and there are {gpus}", remedy="Lower execution.shards."
        )
    trials = concurrent_trials or TRIALS_IN_FLIGHT
    work = replace(work, concurrent_trials=trials)
    ranges = even_ranges(len(model.blocks), count)
    memory = tuple(shard_memory(model, start, stop, dtype, work) for start, stop in ranges)
    kept = max(knowledge_bytes(model.blocks[start:stop], SIZES[dtype], work) for start, stop in ranges)
    plan = ShardPlan(
        ranges=ranges,
        device=device,
        dtype=dtype,
        cpus=_reserved_cpus(cpus, count, threads, device),
        gpus=1.0 if device == "cuda" else 0.0,
        threads=threads,
        concurrent_trials=trials,
        memory=memory,
        knowledge_bytes=kept + KNOWLEDGE_MARGIN,
        shares_cores=device == "cpu" and count * threads > cpus,
    )
    _check_fit(plan, nodes)
    return plan


def _shard_count(model: ModelShape, wanted: int | None, automatic: int) -> int:
    blocks = len(model.blocks)
    if wanted is not None and wanted > blocks:
        raise CapacityError(
            f"execution.shards is {wanted}, but the model has {blocks} blocks",
            allowed=f"1 to {blocks}, or auto",
        )
    return wanted if wanted is not None else min(blocks, automatic)


def _reserved_cpus(cpus: float, shards: int, threads: int, device: str) -> float:
    """A shard's share of the node, a sliver less than all of it, because trials need one too."""
    share = (cpus - 0.1) / shards
    wanted = 1.0 if device == "cuda" else float(threads)
    reserved = min(wanted, share)
    return round(reserved, 2) if reserved < 1 else float(int(reserved))  # Ray takes whole CPUs above one


def _check_fit(plan: ShardPlan, nodes: Sequence[Node]) -> None:
    if plan.device == "cuda":
        _check_bytes(
            "device", max(memory.device for memory in plan.memory), min(n.gpu_bytes for n in nodes if n.gpus)
        )
        needed = sum(memory.host for memory in plan.memory)
    else:
        needed = sum(memory.total for memory in plan.memory)
    _check_bytes("host", needed, sum(node.memory_bytes for node in nodes))


def _check_bytes(kind: str, needed: int, there: int) -> None:
    if there and needed > there:
        more = "Use more shards" if kind == "device" else "Use more or larger nodes"
        raise CapacityError(
            f"the sweep needs {format_bytes(needed)} of {kind} memory, and there are {format_bytes(there)}",
            remedy=f"{more}, lower execution.concurrent_trials or calibration.num_samples, or choose a smaller dtype.",
        )


def format_bytes(count: float) -> str:
    """As people read it: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
