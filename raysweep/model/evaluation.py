"""Next-token losses of token windows, summed so that batches, shards and threads change nothing."""

# B windows of a batch, T tokens of a window, H hidden, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from raysweep.model.shard import ModelShard

LOGITS_LIMIT = 1 << 27  # numbers in one piece of logits: half a GiB in float32


@torch.no_grad()
def window_losses(shard: ModelShard, hidden_BTH: Tensor, ids_BT: Tensor) -> list[float]:
    """Sum of the next-token losses of every window in nats, float64, over its T - 1 targets.

    hidden_BTH: what leaves the last block. Only on the last shard.
    """
    ids_BT = ids_BT.to(hidden_BTH.device)
    losses: list[float] = []
    for rows in _pieces(shard, hidden_BTH):
        logits_BTV = shard.logits(hidden_BTH[rows])[:, :-1].float()
        targets_BT = ids_BT[rows, 1:]
        loss_N = functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
        losses += loss_N.view(targets_BT.shape).double().sum(1).tolist()
    return losses


def _pieces(shard: ModelShard, hidden_BTH: Tensor) -> list[slice]:
    """Windows whose logits are held at once: a fixed function of the shapes."""
    samples, tokens, _ = hidden_BTH.shape
    vocabulary: int = shard.model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    size = max(1, LOGITS_LIMIT // (tokens * vocabulary))
    return [slice(start, min(start + size, samples)) for start in range(0, samples, size)]
