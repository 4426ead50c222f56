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


def ria_score(weight_OI: Tensor, norm_I: Tensor, power: float) -> Tensor:
    """(|W| / sum over its column + |W| / sum over its row) * ||X_j||_2^power, float32 (O, I).

    Relative importance and activations (Zhang et al., ICLR 2024, openreview Tr0lPx9woF); the share of zero in a row or
    column of zeros is 0.
    """
    size_OI = weight_OI.float().abs()
    relative_OI = _share(size_OI, size_OI.sum(0, keepdim=True)) + _share(
        size_OI, size_OI.sum(1, keepdim=True)
    )
    return relative_OI * norm_I.float().pow(power)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / torch.where(whole > 0, whole, 1.0)


def random_score(shape: Sequence[int], seed: int, name: str) -> Tensor:
    """Uniform scores in [0, 1), float32 (O, I), fixed by the seed and the layer's name alone.

    Drawn on the CPU, so that no device, shard or order of layers changes them.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(shape, generator=generator)
