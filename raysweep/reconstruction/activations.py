"""Dense activations at the boundaries of blocks: inputs and targets of every unit, kept for all trials."""

# S samples, B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

CPU_BATCH_TOKENS = 2048  # measured on one core: larger batches are no faster
DEVICE_BATCH_TOKENS = 16384  # fills one GPU with a block of an 8B model

Key = TypeVar("Key", bound=Hashable)


def batches(samples: int, tokens: int, device: torch.device) -> list[slice]:
    """The samples cut into the batches of every forward pass over a text.

    A fixed function of the shape, never of free memory, so that it changes no number.
    """
    limit = CPU_BATCH_TOKENS if device.type == "cpu" else DEVICE_BATCH_TOKENS
    size = max(1, limit // tokens)
    return [slice(start, min(start + size, samples)) for start in range(0, samples, size)]


@dataclass
class TextActivations:
    """What flows at the boundaries of the blocks when a text passes through the dense model, each (S, T, H).

    inputs:      by block, what enters it; under the index after the last block, what leaves the range
    middles:     by block, what the attention half gives
    mlp_outputs: by block with parallel halves, what the MLP half gives
    """

    samples: int
    inputs: dict[int, Tensor] = field(default_factory=dict)
    middles: dict[int, Tensor] = field(default_factory=dict)
    mlp_outputs: dict[int, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return next(iter(self.inputs.values())).shape[1]

    @property
    def nbytes(self) -> int:
        kept = (*self.inputs.values(), *self.middles.values(), *self.mlp_outputs.values())
        return sum(tensor.nbytes for tensor in kept)


def keep_rows(
    kept: dict[Key, Tensor], key: Key, samples: int, rows: slice, batch: Tensor, store: torch.device
) -> None:
    """Writes one batch (B, ...) into `kept[key]` (S, ...) on `store`; the first batch takes the storage."""
    if key not in kept:
        kept[key] = torch.empty(samples, *batch.shape[1:], dtype=batch.dtype, device=store)
    kept[key][rows] = batch


def fetch(stored_STH: Tensor, rows: slice | Tensor, device: torch.device) -> Tensor:
    """A batch of stored activations on `device`. Chosen rows are copied; a slice of what lies there is a view."""
    return stored_STH[rows].to(device, non_blocking=True)
