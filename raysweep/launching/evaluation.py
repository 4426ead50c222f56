"""`raysweep evaluate`: any model measured by the protocol of a sweep, on tasks, and with sparse kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from raysweep.cluster.nodes import this_node
from raysweep.config.sections import ModelConfig, PerplexityConfig
from raysweep.errors import CapacityError, UsageError
from raysweep.launching.task_job import working_bytes
from raysweep.model.checkpoint import ModelSource
from raysweep.model.loading import DTYPES
from raysweep.model.shape import ModelShape
from raysweep.model.shape_reading import read_shape
from raysweep.model.shard import ModelShard
from raysweep.model.tasks import TaskScore, TaskSet, score_tasks
from raysweep.model.tokenizer import load_tokenizer
from raysweep.model.tokens import TokenSet
from raysweep.model.whole import load_whole, spread
from raysweep.shards.alone import perplexities, ranges_that_fit, shards_one_by_one
from raysweep.shards.plan import format_bytes
from raysweep.sweep.prepare import entry_tokens

if TYPE_CHECKING:
    from raysweep.launching.speed import SparseFound

Tell = Callable[[str], None]
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Wanted:
    """What is to be measured on which model, and how.

    entries: texts;  shorten: windows longer than the model takes are as long as it takes
    tasks: of lm-eval, that are known to be there
    device: auto, cpu or cuda, or cuda:N;  threads: of the CPU, None as torch has it
    """

    model: ModelConfig
    entries: tuple[PerplexityConfig, ...] = ()
    shorten: bool = False
    tasks: TaskSet | None = None
    device: str = "auto"
    threads: int | None = None
    batch_size: int = 8
    sparse: bool = False


@dataclass(frozen=True)
class Measured:
    """What came of it.

    entries: texts, as they were measured
    windows, tokens: of each text, by the name of its entry, as its perplexity is
    sparse: of sparse kernels, where they were asked for
    """

    dtype: str
    device: str
    entries: tuple[PerplexityConfig, ...] = ()
    windows: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    sparse: SparseFound | None = None


def evaluate(wanted: Wanted, tell: Tell) -> Measured:
    """Measures a model. Raises UsageError before anything is read for what cannot work.

    tell: hears what is done next
    """
    device = chosen_device(wanted.device)
    if wanted.threads is not None:
        torch.set_num_threads(wanted.threads)
    tell("Checking model and data")
    model = wanted.model
    source = ModelSource(model.path, model.revision, model.trust_remote_code)
    shape = read_shape(source, model.dtype)
    dtype = shape.dtype_on_cpu if device.type == "cpu" else shape.dtype_on_device
    if wanted.sparse:
        from raysweep.model.sparse_kernels import check_sparse_kernels

        check_sparse_kernels(device, DTYPES[dtype])
    tokenizer = load_tokenizer(model.path, model.revision, model.trust_remote_code)
    entries = tuple(_shortened(entry, shape) if wanted.shorten else entry for entry in wanted.entries)
    texts = {}
    for entry in entries:
        try:
            texts[entry.name] = entry_tokens(entry, tokenizer, shape)
        except UsageError as error:
            if len(entries) == 1:
                raise
            raise error.inside(f"{entry.name}: ") from error
    measuring = _Measuring(source, shape, dtype, device, tokenizer, tell)
    spreads = wanted.tasks is not None and measuring.spreads(wanted.device)
    found = Measured(
        dtype,
        _device_name(device),
        entries,
        {name: len(text) for name, text in texts.items()},
        {name: int(text.input_ids.size) for name, text in texts.items()},
    )
    if wanted.sparse:
        sparse = measuring.with_sparse_kernels(texts)
        found.perplexity.update(sparse.dense_perplexity)
        return replace(found, sparse=sparse)
    found.perplexity.update(measuring.perplexities(texts))
    if wanted.tasks is not None:
        found.tasks.update(measuring.tasks(wanted.tasks, wanted.batch_size, spreads))
    return found


def _shortened(entry: PerplexityConfig, shape: ModelShape) -> PerplexityConfig:
    longest = shape.max_positions or entry.sequence_length
    return entry.model_copy(update={"sequence_length": min(entry.sequence_length, longest)})


def chosen_device(name: str) -> torch.device:
    """Raises UsageError for a device that this machine does not have."""
    available = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    kind, _, number = name.partition(":")
    known = kind in DEVICES[1:] and (not number or (number.isdecimal() and kind == "cuda"))
    if not known:
        raise UsageError(f"unknown device {name!r}", where="--device", allowed="auto, cpu, cuda, or cuda:N")
    if kind == "cuda" and int(number or 0) >= available:
        there = f"{available} GPU{'s' * (available != 1)} that torch can use"
        raise UsageError(
            f"device {name!r} is not here: this machine has {there}", where="--device", allowed="cpu"
        )
    return torch.device(name)


@dataclass(frozen=True)
class _Measuring:
    """One model on one device."""

    source: ModelSource
    shape: ModelShape
    dtype: str
    device: torch.device
    tokenizer: Any
    tell: Tell

    def perplexities(self, texts: Mapping[str, TokenSet]) -> dict[str, float]:
        if not texts:
            return {}
        longest = max(text.sequence_length for text in texts.values())
        ranges = ranges_that_fit(self.shape, self.dtype, self.device, longest, free_bytes(self.device))
        parts = "" if len(ranges) == 1 else f" in {len(ranges)} parts, one after another"
        self.tell(f"Measuring perplexity of {self.source.path}{parts}")
        return perplexities(shards_one_by_one(self.source, self.dtype, self.device, ranges), texts)

    def spreads(self, asked: str) -> bool:
        """Whether a whole model takes all GPUs. Raises CapacityError where it does not fit at all."""
        needed, free = working_bytes(self.shape, self.dtype), free_bytes(self.device)
        if not free or needed <= free:
            return False
        where, remedy = str(self.device), "Leave --tasks out: texts are measured part by part."
        if self.device.type == "cuda" and asked in ("auto", "cuda"):
            gpus = torch.cuda.device_count()
            free = sum(free_bytes(torch.device(f"cuda:{gpu}")) for gpu in range(gpus))
            host = this_node().memory_bytes  # through which it passes
            if gpus > 1 and needed <= free and (not host or needed <= host):
                return True
            where, remedy = f"{gpus} GPU{'s' * (gpus != 1)}", f"Try --device cpu. {remedy}"
        raise CapacityError(
            f"tasks need a whole model in memory: {format_bytes(needed)}, and {where} "
            f"ha{'ve' if where.endswith('s') else 's'} {format_bytes(free)} free",
            where="--tasks",
            remedy=remedy,
        )

    def tasks(self, tasks: TaskSet, batch_size: int, spreads: bool) -> dict[str, TaskScore]:
        self.tell(f"Loading {self.source.path}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of texts that were measured before
        model = load_whole(self.source, self.dtype, "cpu" if spreads else self.device)
        model = spread(model) if spreads else model
        self.tell(f"Measuring {', '.join(tasks.names)}")
        return score_tasks(model, self.tokenizer, tasks, batch_size)

    def with_sparse_kernels(self, texts: Mapping[str, TokenSet]) -> SparseFound:
        from raysweep.launching.speed import compare_kernels

        self.tell(f"Loading {self.source.path}")
        shard = ModelShard.load(self.source, dtype=self.dtype, device=self.device)
        return compare_kernels(shard, texts, self.shape, self.tell)


def free_bytes(device: torch.device) -> int:
    """Of a device's memory; on a CPU of what this process may use in all. 0 = unknown"""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return this_node().memory_bytes


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
