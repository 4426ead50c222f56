"""Steps under a mask: removed weights are exactly zero after every step; 16-bit ones have float32 masters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from raysweep.errors import NumericalError

MOMENTUM = 0.9  # of SGD
NORM_EPSILON = 1e-6  # as in torch's own clipping


def learning_rate_factor(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Factor of step `step`, from 0: linear warm-up over `warmup_fraction` of the steps, then linear to zero.

    The first step of a warm-up has factor 0 and the step after the last would have factor 0 again, as in the
    schedule that the study's public code uses.
    """
    warmup_steps = int(warmup_fraction * total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    return (total_steps - step) / max(1, total_steps - warmup_steps)


def clip_factor(squares: Iterable[float], max_grad_norm: float | None) -> float:
    """What gradients are multiplied by so that their norm is at most `max_grad_norm`; 1 without a limit.

    squares: squared norms of all gradients of a unit; summed exactly, so that shards change nothing
    """
    if max_grad_norm is None:
        return 1.0
    return min(1.0, max_grad_norm / (math.sqrt(math.fsum(squares)) + NORM_EPSILON))


class MaskedOptimizer:
    """AdamW (weight decay 0, betas 0.9 and 0.999) or SGD (momentum 0.9) on `parameters`, whose removed entries stay
    exactly zero.

    kind:  adamw or sgd
    masks: for every parameter a tensor of its shape, bool, True = kept, or None

    Removed entries must be zero at the start: their gradients are set to zero, so their moments and with them
    their updates are exactly zero. Parameters in 16 bits get float32 masters that the steps are taken on.
    """

    def __init__(
        self,
        kind: str,
        parameters: Sequence[nn.Parameter],
        masks: Sequence[Tensor | None],
        learning_rate: float,
    ) -> None:
        self.parameters, self.learning_rate = list(parameters), learning_rate
        self._low = [parameter.dtype != torch.float32 for parameter in self.parameters]
        self.masters = [
            master_of(parameter) if low else parameter
            for parameter, low in zip(self.parameters, self._low, strict=True)
        ]
        pairs = zip(self.masters, masks, strict=True)
        masked = [(master, mask.to(master)) for master, mask in pairs if mask is not None]
        self._masked = [master for master, _ in masked]
        self._factors = [factor for _, factor in masked]
        self._optimizer: torch.optim.Optimizer
        if kind == "sgd":
            self._moments = 1
            self._optimizer = torch.optim.SGD(self.masters, lr=learning_rate, momentum=MOMENTUM, fused=True)
        else:
            self._moments = 2
            self._optimizer = torch.optim.AdamW(self.masters, lr=learning_rate, weight_decay=0.0, fused=True)

    @property
    def nbytes(self) -> int:
        """Bytes of float32 masters (where they are copies), gradients, moments, and masks as factors."""
        masters = sum(master.nbytes for master in self.masters)
        copies = sum(master.nbytes for master, low in zip(self.masters, self._low, strict=True) if low)
        gradients = sum(parameter.nbytes for parameter in self.parameters) + copies
        factors = sum(factor.nbytes for factor in self._factors)
        return copies + gradients + self._moments * masters + factors

    def gather(self) -> None:
        """Takes over the parameters' gradients as float32 and sets those of removed entries to zero."""
        for master, parameter, low in zip(self.masters, self.parameters, self._low, strict=True):
            gradient = gradient_of(parameter)
            if low:
                master.grad, parameter.grad = gradient.float(), None
        if self._masked:
            torch._foreach_mul_([gradient_of(master) for master in self._masked], self._factors)

    def squares(self) -> list[float]:
        """Squared norms of the gathered gradients, float64, row by row: sums that no number of threads changes."""
        rows = (gradient_of(master).double().square().sum(-1).flatten() for master in self.masters)
        return [square for row in rows for square in row.tolist()]

    def step(self, factor: float, clip: float = 1.0) -> None:
        """A step on the gathered gradients times `clip`, at `factor` times the learning rate; clears them."""
        if clip != 1.0:
            torch._foreach_mul_([gradient_of(master) for master in self.masters], clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        self._optimizer.step()
        for master in self.masters:
            master.grad = None
        lowered = [place for place, low in enumerate(self._low) if low]
        if lowered:
            torch._foreach_copy_(
                [self.parameters[place].detach() for place in lowered],
                [self.masters[place] for place in lowered],
            )

    def check(self) -> None:
        """Raises NumericalError when a parameter is no longer finite."""
        check_finite(self.parameters, self.learning_rate)


def check_finite(parameters: Iterable[Tensor], learning_rate: float) -> None:
    """Raises NumericalError when a parameter is no longer finite."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise NumericalError(
            f"the weights are not finite after training at learning rate {learning_rate:g}: lower it"
        )


def master_of(parameter: Tensor) -> nn.Parameter:
    """A float32 copy on which steps are taken."""
    return nn.Parameter(parameter.detach().float())


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """That it must have by now."""
    if parameter.grad is None:
        raise RuntimeError("a parameter is trained that the loss does not depend on")
    return parameter.grad
