"""AdamW under a mask: a removed weight is exactly zero after every step, and low precision keeps float32 masters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysweep.errors import NumericalError


def learning_rate_factor(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Linear warm-up over `warmup_fraction` of the steps, then linear to zero; the factor of step `step` from 0.

    The first step of a warm-up has factor 0 and the step after the last would have factor 0 again, as in the
    schedule that the study's public code uses.
    """
    warmup_steps = int(warmup_fraction * total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    return (total_steps - step) / max(1, total_steps - warmup_steps)


class MaskedAdamW:
    """AdamW (weight decay 0, betas 0.9 and 0.999) on `parameters`, whose removed entries stay exactly zero.

    `masks[k]` (bool, True = kept) has the shape of `parameters[k]`, or is None. Removed entries must be zero at the
    start: their gradients are set to zero, so their moments and with them their updates are exactly zero.
    Parameters in bfloat16 or float16 get float32 masters that the steps are taken on.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        masks: Sequence[Tensor | None],
        learning_rate: float,
        max_grad_norm: float | None = None,
    ) -> None:
        self.parameters = list(parameters)
        masked = [(k, mask) for k, mask in enumerate(masks) if mask is not None]
        self._masked = [k for k, _ in masked]
        self._factors = [mask.to(self.parameters[k].device, torch.float32) for k, mask in masked]
        self._low = self.parameters[0].dtype != torch.float32
        self.masters = [self._master(parameter) for parameter in self.parameters]
        self.learning_rate, self.max_grad_norm = learning_rate, max_grad_norm
        self._adamw = torch.optim.AdamW(self.masters, lr=learning_rate, weight_decay=0.0, fused=True)

    @property
    def nbytes(self) -> int:
        """Bytes of float32 masters (where they are copies), gradients and both moments."""
        masters = sum(master.nbytes for master in self.masters)
        gradients = sum(parameter.nbytes for parameter in self.parameters) + (masters if self._low else 0)
        factors = sum(factor.nbytes for factor in self._factors)
        return (masters if self._low else 0) + gradients + 2 * masters + factors

    def step(self, factor: float) -> None:
        """One step with the gradients that the parameters hold, at `factor` times the learning rate; clears them."""
        if self._low:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad = parameter.grad.float() if parameter.grad is not None else None
        gradients = [master.grad for master in self.masters]
        masked = [gradients[k] for k in self._masked]
        if masked:
            torch._foreach_mul_(masked, self._factors)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm)
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate * factor
        self._adamw.step()
        if self._low:
            torch._foreach_copy_([parameter.detach() for parameter in self.parameters], self.masters)
        for parameter in (*self.masters, *self.parameters):
            parameter.grad = None

    def check(self) -> None:
        """Raises NumericalError when a parameter is no longer finite."""
        for master in self.masters:
            if not bool(torch.isfinite(master).all()):
                raise NumericalError(
                    f"the weights are not finite after training at learning rate {self.learning_rate:g}: lower it"
                )

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.detach().float().clone()) if self._low else parameter
