"""Activations of whole texts, in stores, and the batches in which they come and go."""

# S samples, B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from raysweep.at_once import batch_tokens
from raysweep.reconstruction.stores import Store

Key = TypeVar("Key", bound=Hashable)


def batches(samples: int, tokens: int, device: torch.device) -> list[slice]:
    """The samples cut into the batches of every forward pass over a text.

    A fixed function of the shape, never of free memory, so that it changes no number.
    """
    limit = batch_tokens(device.type == "cuda")
    size = max(1, limit // tokens)
    return [slice(start, min(start + size, samples)) for start in range(0, samples, size)]


def batches_of(rows: slice, tokens: int, device: torch.device) -> list[slice]:
    """The same of some samples of a text, from the start of a batch on."""
    cut = batches(rows.stop - rows.start, tokens, device)
    return [slice(rows.start + each.start, rows.start + each.stop) for each in cut]


def sizes(pieces: Sequence[slice]) -> list[int]:
    return [piece.stop - piece.start for piece in pieces]


def together(pieces: Sequence[Tensor]) -> Tensor:
    """Batches one after another; one alone as it is."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def keep_rows(
    kept: dict[Key, Tensor], key: Key, samples: int, rows: slice, batch: Tensor, store: Store
) -> None:
    """Writes one batch (B, ...) into `kept[key]` (S, ...) in `store`; the first batch takes the storage."""
    if key not in kept:
        kept[key] = store.empty((samples, *batch.shape[1:]), batch.dtype)
    kept[key][rows] = batch


def fetch(stored_STH: Tensor, rows: slice | Tensor, device: torch.device) -> Tensor:
    """A batch of stored activations on `device`. Chosen rows are copied; a slice of what lies there is a view."""
    return stored_STH[rows].to(device, non_blocking=True)
