"""AdamW on the weights that a mask keeps: no state for removed ones, and one kernel that reads a gradient once.

A step is bound by memory. A dense one moves 29 bytes a weight (float32 master and two moments in and out, a 16-bit
gradient, the mask, the 16-bit weight); one that has only kept weights moves 5 + 24 * density.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from raysweep.errors import first_line

log = logging.getLogger(__name__)

TILE = 1024  # weights of one program


def can_keep(parameter: Tensor) -> bool:
    """Whether there is a kernel for it: 16-bit weights on a GPU, with a Triton that works."""
    return (
        parameter.is_cuda
        and parameter.dtype in (torch.bfloat16, torch.float16)
        and parameter.is_contiguous()
        and _works(parameter.device)
    )


@cache
def _works(device: torch.device) -> bool:
    """Found by trying: Triton needs a C compiler and Python's headers when it builds a kernel."""
    if find_spec("triton") is None:
        return False
    weights, one = torch.zeros(TILE, dtype=torch.bfloat16, device=device), torch.ones((), device=device)
    try:
        kept = KeptWeights(weights, torch.ones_like(weights, dtype=torch.bool))
        kept.step(weights.clone(), one, one, (0.9, 0.999), 1e-8)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever it lacks, AdamW works without
        log.warning("AdamW keeps state of removed weights as well: %s", first_line(error))
        return False
    return True


class KeptWeights:
    """Masters and moments, float32, of one tensor's kept weights, one after another in the order of its memory.

    parameter: 16 bits, contiguous; its removed weights are zero and stay so;  mask: bool, True = kept
    """

    def __init__(self, parameter: Tensor, mask: Tensor) -> None:
        self._parameter, self._mask = parameter, mask.contiguous()
        flat = self._mask.flatten()
        whole = flat.numel() // TILE * TILE
        counts = torch.cat([flat[:whole].view(-1, TILE).sum(1), flat[whole:].sum()[None]])
        self._begins = counts.cumsum(0) - counts  # of every tile among the kept weights
        self._master = parameter.flatten()[flat].float()
        self._first, self._second = torch.zeros_like(self._master), torch.zeros_like(self._master)

    @property
    def nbytes(self) -> int:
        """With the gradient."""
        state = sum(tensor.nbytes for tensor in (self._master, self._first, self._second, self._begins))
        return state + self._mask.nbytes + self._parameter.nbytes

    def step(
        self, gradient: Tensor, size: Tensor, root: Tensor, betas: tuple[float, float], epsilon: float
    ) -> None:
        """size, root: float32 (), as in a row of `DeviceOptimizer.table`; nothing waits for the device."""
        from raysweep.reconstruction.kept_kernel import adamw

        weights = self._parameter.numel()
        adamw[(self._begins.numel(),)](
            self._parameter,
            gradient.contiguous(),
            self._mask.view(torch.uint8),
            self._begins,
            self._master,
            self._first,
            self._second,
            size,
            root,
            weights,
            1.0 - betas[0],  # here: in float32 the rest of 0.999 is 1e-5 too small
            betas[1],
            1.0 - betas[1],
            epsilon,
            TILE=TILE,
        )
