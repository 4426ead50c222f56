"""Dense activations at the boundaries of a range's blocks: the inputs and targets of every unit, kept for all trials."""

# S samples, B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

CPU_BATCH_TOKENS = 2048  # measured on one core: larger batches are no faster
DEVICE_BATCH_TOKENS = 16384  # fills one GPU with a block of an 8B model


def batch_samples(tokens: int, device: torch.device) -> int:
    """How many samples of `tokens` tokens pass forward together: a fixed function of the shape, never of free memory."""
    limit = CPU_BATCH_TOKENS if device.type == "cpu" else DEVICE_BATCH_TOKENS
    return max(1, limit // tokens)


def batches(samples: int, tokens: int, device: torch.device) -> list[slice]:
    """The samples cut into the batches that every forward pass over a text uses."""
    size = batch_samples(tokens, device)
    return [slice(start, min(start + size, samples)) for start in range(0, samples, size)]


@dataclass
class TextActivations:
    """What flows at the boundaries of the blocks when one text passes through the dense model, each (S, T, H).

    inputs:      by block, what enters it; under the index after the last block, what leaves the range
    middles:     by block, what the attention half gives
    mlp_outputs: by block with parallel halves, what the MLP half gives
    """

    samples: int
    inputs: dict[int, Tensor] = field(default_factory=dict)
    middles: dict[int, Tensor] = field(default_factory=dict)
    mlp_outputs: dict[int, Tensor] = field(default_factory=dict)

    def write(self, place: dict[int, Tensor], index: int, rows: slice, hidden_BTH: Tensor) -> None:
        """Keeps the rows of one batch; storage for all samples is taken with the first."""
        if index not in place:
            place[index] = torch.empty(self.samples, *hidden_BTH.shape[1:], dtype=hidden_BTH.dtype)
        place[index][rows] = hidden_BTH

    @property
    def tokens(self) -> int:
        return next(iter(self.inputs.values())).shape[1]

    @property
    def nbytes(self) -> int:
        places = (self.inputs, self.middles, self.mlp_outputs)
        return sum(tensor.nbytes for place in places for tensor in place.values())


def fetch(stored_STH: Tensor, rows: slice | Tensor, device: torch.device) -> Tensor:
    """A batch of stored activations on `device`. Chosen rows are copied; a slice on the CPU is a view."""
    return stored_STH[rows].to(device, non_blocking=True)
