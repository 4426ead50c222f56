"""Perplexities of a model by one process alone: its blocks range by range, with the numbers of a shard group."""

# B samples of a batch, T tokens of a sample, H hidden; S samples of a text

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from raysweep.errors import CapacityError
from raysweep.model.checkpoint import ModelSource
from raysweep.model.evaluation import window_losses
from raysweep.model.shape import ModelShape
from raysweep.model.shard import ModelShard
from raysweep.model.tokens import TokenSet
from raysweep.reconstruction.activations import batches, keep_rows
from raysweep.reconstruction.placement import HOST
from raysweep.reconstruction.stores import Store
from raysweep.shards.group_info import TextInfo
from raysweep.shards.memory import Workload, shard_memory
from raysweep.shards.outcome import perplexity
from raysweep.shards.plan import format_bytes

ON_HOST = Store(HOST, torch.device("cpu"))
USED_SHARE = 0.85  # of the memory that is free: allocators cut it into pieces; assumption


def ranges_that_fit(
    shape: ModelShape, dtype: str, device: torch.device, tokens: int, room: int
) -> list[tuple[int, int]]:
    """The blocks (start, stop) that are in memory at once, as many as fit: of most models all.

    tokens: of the longest window;  room: bytes that are free there, 0 = unknown. Raises CapacityError where not even
    one block fits.
    """
    total, ranges, start = len(shape.blocks), list[tuple[int, int]](), 0
    while start < total:
        stop = total
        while (
            room and stop > start and _needed(shape, start, stop, dtype, device, tokens) > room * USED_SHARE
        ):
            stop -= 1
        if stop == start:
            needed = _needed(shape, start, start + 1, dtype, device, tokens)
            raise CapacityError(
                f"block {start} alone needs {format_bytes(needed)} of memory, and {format_bytes(room)} are free",
                remedy="Lower the sequence length, choose a smaller dtype, or another device.",
            )
        ranges.append((start, stop))
        start = stop
    return ranges


def _needed(shape: ModelShape, start: int, stop: int, dtype: str, device: torch.device, tokens: int) -> int:
    """Weights of the blocks and of what lies at their ends, and what a batch takes on its way."""
    work = Workload(
        texts=(),
        evaluation_tokens=tokens,
        batch_size=1,
        masks=0,
        granularities=frozenset(),
        concurrent_trials=0,
    )
    memory = shard_memory(shape, start, stop, dtype, work, device=device.type)
    return memory.weights + memory.evaluation


def shards_one_by_one(
    source: ModelSource, dtype: str, device: torch.device, ranges: Iterable[tuple[int, int]]
) -> Iterator[ModelShard]:
    """Reads each range when it is asked for."""
    for start, stop in ranges:
        gc.collect()  # the range before: its blocks know it, so that it would wait for Python to look for cycles
        yield ModelShard.load(source, start, stop, dtype, device)


@torch.no_grad()
def perplexities(shards: Iterable[ModelShard], texts: Mapping[str, TokenSet]) -> dict[str, float]:
    """Of every text, by its name.

    shards: that follow one another and hold all blocks; each is let go before the next one is asked for
    The batches are those of a sweep's shards, so that the numbers are: on CPUs in float32 to the bit at equal threads.
    Raises NumericalError when a mean loss is not finite.
    """
    waiting: dict[str, Tensor] = {}  # (S, T, H) between two ranges
    losses: dict[str, list[float]] = {}
    for shard in shards:
        for name, tokens in texts.items():
            losses[name] = _pass_text(shard, name, tokens, waiting)
        del shard
    return {name: perplexity(losses[name], _info(name, tokens)) for name, tokens in texts.items()}


def _pass_text(shard: ModelShard, name: str, tokens: TokenSet, waiting: dict[str, Tensor]) -> list[float]:
    """Passes a text through the blocks of a shard; what comes out waits on the host, or ends in its losses."""
    ids_ST, losses = torch.tensor(tokens.input_ids), list[float]()
    for rows in batches(len(tokens), tokens.sequence_length, shard.device):
        ids_BT = ids_ST[rows]
        hidden_BTH = shard.embed(ids_BT) if shard.is_first else waiting[name][rows].to(shard.device)
        for block in shard.blocks:
            hidden_BTH = block.run(hidden_BTH)
        if shard.is_last:
            losses += window_losses(shard, hidden_BTH, ids_BT)
        else:
            keep_rows(waiting, name, len(tokens), rows, hidden_BTH, ON_HOST)
    return losses


def _info(name: str, tokens: TokenSet) -> TextInfo:
    return TextInfo(name, ((0, len(tokens)),), tokens.sequence_length)
