"""Masks of linears while nobody works with them: a bit a weight."""

# O outputs, I inputs of a linear

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BITS = 8


@dataclass(frozen=True)
class PackedMask:
    """bits: uint8 (ceil(O * I / 8),): weights row by row, the first of a byte in its highest bit, 1 = kept

    shape: (O, I)
    """

    bits: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask_OI: Tensor) -> PackedMask:
        """mask_OI: bool, True = kept; the bits lie where it does"""
        outputs, inputs = mask_OI.shape
        flat = mask_OI.contiguous().flatten()
        if flat.device.type == "cpu":
            return cls(torch.from_numpy(np.packbits(flat.numpy())), (outputs, inputs))
        return cls(packed(flat), (outputs, inputs))

    def on(self, device: torch.device) -> Tensor:
        """The mask on a device, bool (O, I), in storage of its own."""
        outputs, inputs = self.shape
        bits = self.bits.to(device)
        if device.type == "cpu":
            flat = torch.from_numpy(np.unpackbits(bits.numpy(), count=outputs * inputs))
        else:
            flat = unpacked(bits, outputs * inputs)
        return flat.view(torch.bool).view(self.shape)

    def moved(self, move: Callable[[Tensor], Tensor]) -> PackedMask:
        """The same with its bits elsewhere."""
        return replace(self, bits=move(self.bits))

    def numel(self) -> int:
        """Of the weights."""
        outputs, inputs = self.shape
        return outputs * inputs


def packed(flat: Tensor) -> Tensor:
    """bool (N,) to uint8 (ceil(N / 8),), as numpy's packbits does on CPUs."""
    bytes_ = flat.view(torch.uint8)
    if lacking := -len(bytes_) % BITS:
        bytes_ = F.pad(bytes_, (0, lacking))
    return (bytes_.view(-1, BITS) * _places(flat.device)).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, count: int) -> Tensor:
    """The first `count` bits as uint8, 0 or 1."""
    return (bits[:, None] & _places(bits.device)).ne_(0).flatten()[:count]


@cache
def _places(device: torch.device) -> Tensor:
    """Made once a device: bringing them there would wait for its work."""
    return torch.tensor([1 << place for place in reversed(range(BITS))], dtype=torch.uint8, device=device)
