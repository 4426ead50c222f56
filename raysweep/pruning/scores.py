"""Scores of weights under the criteria; higher is kept."""

# O outputs, I inputs of a layer

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def magnitude_score(weight_OI: Tensor) -> Tensor:
    """|W|, float32 (O, I)."""
    return weight_OI.float().abs()


def wanda_score(weight_OI: Tensor, norm_I: Tensor) -> Tensor:
    """|W| * ||X_j||_2 per weight, float32 (O, I); norms up to a common factor (arXiv 2306.11695, eq. 1)."""
    return weight_OI.float().abs() * norm_I.float()


def random_score(shape: Sequence[int], seed: int, name: str) -> Tensor:
    """Uniform scores in [0, 1), float32 (O, I), fixed by the seed and the layer's name alone.

    Drawn on the CPU, so that no device, shard or order of layers changes them.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(shape, generator=generator)
