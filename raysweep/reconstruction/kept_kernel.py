"""The kernel of `kept_weights`. Imported where there is Triton, which comes with torch for GPUs."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Triton takes no annotations but its own.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def adamw(
    weights,
    gradients,
    mask,
    begins,
    masters,
    firsts,
    seconds,
    size,
    root,
    count,
    rest1,
    beta2,
    rest2,
    epsilon,
    TILE: tl.constexpr,
):
    """A tile of a tensor. Kept weights lie side by side in masters and moments, so that their reads are, too."""
    tile = tl.program_id(0).to(tl.int64)
    here = tile * TILE + tl.arange(0, TILE)
    inside = here < count
    kept = tl.load(mask + here, mask=inside, other=0).to(tl.int32)
    keep = kept != 0
    place = tl.load(begins + tile) + tl.cumsum(kept, 0) - 1
    gradient = tl.load(gradients + here, mask=keep, other=0.0).to(tl.float32)
    master = tl.load(masters + place, mask=keep, other=0.0)
    first = tl.load(firsts + place, mask=keep, other=0.0)
    second = tl.load(seconds + place, mask=keep, other=0.0)
    first += (gradient - first) * rest1
    second = second * beta2 + gradient * gradient * rest2
    master -= first / (tl.sqrt(second) / tl.load(root) + epsilon) * tl.load(size)
    tl.store(masters + place, master, mask=keep)
    tl.store(firsts + place, first, mask=keep)
    tl.store(seconds + place, second, mask=keep)
    tl.store(weights + here, tl.where(keep, master, 0.0).to(weights.dtype.element_ty), mask=inside)
