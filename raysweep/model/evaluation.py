"""Next-token losses of token windows, summed so that batches, shards and threads change nothing."""

# B windows of a batch, T tokens of a window, H hidden, V vocabulary, N targets of a batch

from __future__ import annotations

import torch
from torch import Tensor

from raysweep.model.shard import ModelShard

LOGITS_LIMIT = 1 << 27  # numbers in one piece of logits: half a GiB in float32; assumption


@torch.no_grad()
def window_losses(shard: ModelShard, hidden_BTH: Tensor, ids_BT: Tensor) -> list[float]:
    """Sum of the next-token losses of every window in nats, float64, over its T - 1 targets.

    hidden_BTH: what leaves the last block. Only on a shard with the head.
    """
    losses: list[float] = []
    size = _windows_at_once(shard, tokens=ids_BT.shape[1])
    for piece_BTH, piece_BT in zip(hidden_BTH.split(size), ids_BT.split(size), strict=True):
        logits_BTV = shard.logits(piece_BTH)[:, :-1].float()
        targets_BT = piece_BT[:, 1:].to(logits_BTV.device)
        # On CPUs a tenth of what `cross_entropy` takes beyond the head, which writes every probability.
        loss_BT = logits_BTV.logsumexp(2) - logits_BTV.gather(2, targets_BT[..., None])[..., 0]
        losses += loss_BT.double().sum(1).tolist()
    return losses


def _windows_at_once(shard: ModelShard, tokens: int) -> int:
    """Windows whose logits are held at once: a fixed function of the shapes."""
    vocabulary: int = shard.model.config.get_text_config().vocab_size
    return max(1, LOGITS_LIMIT // (tokens * vocabulary))
