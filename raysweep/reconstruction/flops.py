"""Counts floating-point operations of a step: matrix products, and attention on every kind of device."""

# B samples, Q query heads, K key heads, T query tokens, S key tokens, D width of a head (V of a value head)

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


def flop_counter() -> FlopCounterMode:
    """A context that counts. Attention counts both products of all pairs of tokens, also where a mask drops some.

    torch has no count for attention on CPUs, and in some releases refuses key heads that several query heads share.
    """
    counted = dict.fromkeys(_operations(""), _forward) | dict.fromkeys(_operations("_backward"), _backward)
    return FlopCounterMode(display=False, custom_mapping=counted)


def _operations(suffix: str) -> list[Any]:
    kinds = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    names = [f"_scaled_dot_product_{kind}{suffix}" for kind in kinds]
    return [getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)]


def _forward(query_BQTD: Shape, key_BKSD: Shape, value_BKSV: Shape, *_: Any, **__: Any) -> int:
    samples, heads, queries, width = query_BQTD
    return 2 * samples * heads * queries * key_BKSD[2] * (width + value_BKSV[3])


def _backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Five products: the scores once more, and the gradients of scores, queries, keys and values."""
    samples, heads, queries, width = query
    return 2 * samples * heads * queries * key[2] * (3 * width + 2 * value[3])
