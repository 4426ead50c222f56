"""Next-token losses of token windows, summed so that batches, shards and threads change nothing."""

# B windows of a batch, T tokens of a window, H hidden, V vocabulary, N targets of a batch

from __future__ import annotations

import torch
from torch import Tensor

from raysweep.at_once import pieces_of_logits
from raysweep.model.shard import ModelShard


@torch.no_grad()
def window_losses(shard: ModelShard, hidden_BTH: Tensor, ids_BT: Tensor) -> list[float]:
    """Sum of the next-token losses of every window in nats, float64, over its T - 1 targets.

    hidden_BTH: what leaves the last block. Only on a shard with the head.
    """
    losses: list[float] = []
    vocabulary: int = shard.model.config.get_text_config().vocab_size
    windows, tokens = pieces_of_logits(ids_BT.shape[1], vocabulary, shard.device.type == "cuda")
    for piece_BTH, piece_BT in zip(hidden_BTH.split(windows), ids_BT.split(windows), strict=True):
        loss_BT = torch.cat(
            [
                _losses(
                    shard, piece_BTH[:, start : start + tokens], piece_BT[:, start + 1 : start + 1 + tokens]
                )
                for start in range(0, piece_BT.shape[1] - 1, tokens)
            ],
            1,
        )
        losses += loss_BT.double().sum(1).tolist()
    return losses


def _losses(shard: ModelShard, hidden_BTH: Tensor, targets_BT: Tensor) -> Tensor:
    """Of every token that has a target, float32 (B, T)."""
    logits_BTV = shard.logits(hidden_BTH)[:, : targets_BT.shape[1]].float()
    targets_BT = targets_BT.to(logits_BTV.device)
    # On CPUs a tenth of what `cross_entropy` takes beyond the head, which writes every probability.
    return logits_BTV.logsumexp(2) - logits_BTV.gather(2, targets_BT[..., None])[..., 0]
