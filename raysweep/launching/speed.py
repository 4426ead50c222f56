"""A model with dense and with sparse kernels: perplexity of both, and tokens a second when batches are read."""

# B windows of a batch, T tokens of a window

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from raysweep.errors import CapacityError
from raysweep.model.linears import Linear, block_linears
from raysweep.model.shape import ModelShape
from raysweep.model.shard import ModelShard
from raysweep.model.sparse_kernels import check_any, choose_linears, exchange_linears
from raysweep.model.tokens import TokenSet
from raysweep.shards.alone import perplexities

PREFILL_BATCHES = (1, 4, 16)
PREFILL_TOKENS = 2048  # of a window, or as many as the model takes
WARM_UP, ROUNDS = 3, 10

Tell = Callable[[str], None]


@dataclass(frozen=True)
class SparseFound:
    """What sparse kernels are worth.

    linears: of how many there are, which they run, in words
    tokens_per_second: by windows of a batch, dense and sparse;  window: its tokens
    dense_bytes, sparse_bytes: of the exchanged weights
    """

    linears: str
    window: int
    tokens_per_second: dict[int, tuple[float, float]]
    dense_perplexity: dict[str, float]
    sparse_perplexity: dict[str, float]
    dense_bytes: int
    sparse_bytes: int


def compare_kernels(
    shard: ModelShard, texts: Mapping[str, TokenSet], shape: ModelShape, tell: Tell
) -> SparseFound:
    """Measures a whole model dense, gives its 2:4 linears sparse weights, and measures it again: it stays sparse.

    Raises UsageError where no linear is 2:4, CapacityError where not even one window fits.
    """
    linears: list[Linear] = [linear for block in shard.blocks for linear in block.linears.values()]
    choice = choose_linears(linears)
    check_any(choice)
    window = min(PREFILL_TOKENS, shape.max_positions or PREFILL_TOKENS)
    tell("Measuring dense kernels")
    dense_perplexity = perplexities([shard], texts)
    dense = prefill_speeds(shard, window, shape.vocabulary)
    tell("Measuring sparse kernels")
    chosen = set(choice.sparse)
    dense_bytes = sum(linear.weight_OI.nbytes for linear in linears if linear.name in chosen)
    sparse_bytes = sum(exchange_linears(block.module, block.prefix, choice) for block in shard.blocks)
    del linears
    for block in shard.blocks:  # whose dense weights are gone with the last that knows them
        block.linears = block_linears(block.module, block.prefix)
    torch.cuda.empty_cache()
    sparse_perplexity = perplexities([shard], texts)
    sparse = prefill_speeds(shard, window, shape.vocabulary)
    return SparseFound(
        choice.describe(),
        window,
        {batch: (dense[batch], sparse[batch]) for batch in dense if batch in sparse},
        dense_perplexity,
        sparse_perplexity,
        dense_bytes,
        sparse_bytes,
    )


def prefill_speeds(shard: ModelShard, window: int, vocabulary: int) -> dict[int, float]:
    """Tokens a second, medians, by windows of a batch that is read as before generating, with logits of its last
    token alone.

    Batches that do not fit are left out. Raises CapacityError where the smallest does not.
    """
    speeds: dict[int, float] = {}
    generator = torch.Generator().manual_seed(0)
    for batch in PREFILL_BATCHES:
        ids_BT = torch.randint(0, vocabulary, (batch, window), generator=generator).to(shard.device)
        try:
            speeds[batch] = ids_BT.numel() / _median_seconds(partial(_read, shard, ids_BT))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
    if not speeds:
        raise CapacityError(
            f"not even one window of {window} tokens fits beside the model", remedy="Use a larger GPU."
        )
    return speeds


@torch.no_grad()
def _read(shard: ModelShard, ids_BT: Tensor) -> None:
    hidden_BTH = shard.embed(ids_BT)
    for block in shard.blocks:
        hidden_BTH = block.run(hidden_BTH)
    shard.logits(hidden_BTH[:, -1:])


def _median_seconds(run: Callable[[], None]) -> float:
    """Of one call, the device drained before and after; the first calls warm up."""
    times = []
    for _ in range(WARM_UP + ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])
