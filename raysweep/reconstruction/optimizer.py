"""AdamW under a mask: removed weights are exactly zero after every step; 16-bit ones have float32 masters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysweep.errors import NumericalError


def learning_rate_factor(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Factor of step `step`, from 0: linear warm-up over `warmup_fraction` of the steps, then linear to zero.

    The first step of a warm-up has factor 0 and the step after the last would have factor 0 again, as in the
    schedule that the study's public code uses.
    """
    warmup_steps = int(warmup_fraction * total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    return (total_steps - step) / max(1, total_steps - warmup_steps)


class MaskedAdamW:
    """AdamW (weight decay 0, betas 0.9 and 0.999) on `parameters`, whose removed entries stay exactly zero.

    masks: for every parameter a tensor of its shape, bool, True = kept, or None

    Removed entries must be zero at the start: their gradients are set to zero, so their moments and with them
    their updates are exactly zero. Parameters in 16 bits get float32 masters that the steps are taken on.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        masks: Sequence[Tensor | None],
        learning_rate: float,
        max_grad_norm: float | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self._low = self.parameters[0].dtype != torch.float32
        self.masters = [_master(parameter) for parameter in self.parameters] if self._low else self.parameters
        pairs = zip(self.masters, masks, strict=True)
        masked = [(master, mask.to(master)) for master, mask in pairs if mask is not None]
        self._masked = [master for master, _ in masked]
        self._factors = [factor for _, factor in masked]
        self.learning_rate, self.max_grad_norm = learning_rate, max_grad_norm
        self._adamw = torch.optim.AdamW(self.masters, lr=learning_rate, weight_decay=0.0, fused=True)

    @property
    def nbytes(self) -> int:
        """Bytes of float32 masters (where they are copies), gradients, both moments, and masks as factors."""
        masters = sum(master.nbytes for master in self.masters)
        gradients = sum(parameter.nbytes for parameter in self.parameters) + (masters if self._low else 0)
        factors = sum(factor.nbytes for factor in self._factors)
        return (masters if self._low else 0) + gradients + 2 * masters + factors

    def step(self, factor: float) -> None:
        """A step on the parameters' gradients, at `factor` times the learning rate; clears the gradients."""
        if self._low:
            self._raise_gradients()
        if self._masked:
            torch._foreach_mul_([_gradient(master) for master in self._masked], self._factors)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm)
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate * factor
        self._adamw.step()
        for master in self.masters:
            master.grad = None
        if self._low:
            torch._foreach_copy_([parameter.detach() for parameter in self.parameters], list(self.masters))

    def check(self) -> None:
        """Raises NumericalError when a parameter is no longer finite."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters):
            raise NumericalError(
                f"the weights are not finite after training at learning rate {self.learning_rate:g}: lower it"
            )

    def _raise_gradients(self) -> None:
        """Moves the gradients of the parameters to their masters, as float32."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = _gradient(parameter).float()
            parameter.grad = None


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().float())


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a parameter is trained that the loss does not depend on")
    return parameter.grad
