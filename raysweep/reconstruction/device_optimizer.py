"""Steps under a mask on a GPU: a few kernels for all tensors of a unit, with nothing read back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysweep.reconstruction.kept_weights import KeptWeights, can_keep
from raysweep.reconstruction.optimizer import MOMENTUM, NORM_EPSILON, check_finite, master_of
from raysweep.reconstruction.programs import compiled
from raysweep.reconstruction.training import TrainingRecipe

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's own, as `MaskedOptimizer` has them
RATE, SIZE, ROOT = range(3)  # of a row of the table


class DeviceOptimizer:
    """As `MaskedOptimizer`, for gradients that arrive together: in the parameters' dtype, not yet masked.

    masks: for every parameter a tensor of its shape, bool, True = kept, or None
    compiles: mask, step and the copy to 16 bits as one kernel a tensor; else torch's own fused step
    Masked tensors in 16 bits are stepped by a kernel that has kept weights alone, where AdamW clips no gradients.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        parameters: Sequence[nn.Parameter],
        masks: Sequence[Tensor | None],
        compiles: bool,
    ) -> None:
        self.recipe, self.compiles = recipe, compiles
        device = parameters[0].device
        self._all = [parameter.detach() for parameter in parameters]  # the same storage
        self._kept = self._kept_weights(masks)
        self._others = [place for place in range(len(parameters)) if place not in self._kept]
        self._parameters = [self._all[place] for place in self._others]
        self._masters = [
            nn.Parameter(parameter) if parameter.dtype == torch.float32 else master_of(parameter)
            for parameter in self._parameters
        ]
        others = [masks[place] for place in self._others]
        self._masks = [None if mask is None else mask.to(device) for mask in others]
        self._rate = torch.zeros((), device=device)
        self._fused: torch.optim.Optimizer | None = None
        self._moments: list[list[Tensor]] = []
        if self._others:
            self._start_others()

    def _kept_weights(self, masks: Sequence[Tensor | None]) -> dict[int, KeptWeights]:
        """By place. Not where gradients are clipped, for which all are seen together first."""
        if self.recipe.optimizer != "adamw" or self.recipe.max_grad_norm is not None:
            return {}
        return {
            place: KeptWeights(parameter, mask.to(parameter.device))
            for place, (parameter, mask) in enumerate(zip(self._all, masks, strict=True))
            if mask is not None and can_keep(parameter)
        }

    def _start_others(self) -> None:
        device = self._rate.device
        if self.recipe.optimizer == "sgd":
            self._moments = [[torch.zeros_like(master) for master in self._masters]]
            self._fused = torch.optim.SGD(self._masters, lr=self._rate, momentum=MOMENTUM, fused=True)
        else:
            self._moments = [[torch.zeros_like(master) for master in self._masters] for _ in range(2)]
            self._fused = torch.optim.AdamW(
                self._masters,
                lr=self._rate,
                betas=BETAS,
                eps=EPSILON,
                weight_decay=0.0,
                fused=True,
                capturable=device.type == "cuda",
            )
        self._share_moments(self._fused)

    def _share_moments(self, fused: torch.optim.Optimizer) -> None:
        """Both ways to step go on where the other one was."""
        for place, master in enumerate(self._masters):
            state = fused.state[master]
            if self.recipe.optimizer == "sgd":
                state["momentum_buffer"] = self._moments[0][place]
            else:
                state["step"] = torch.zeros((), device=master.device)
                state["exp_avg"], state["exp_avg_sq"] = (moment[place] for moment in self._moments)

    @property
    def nbytes(self) -> int:
        """Bytes of float32 masters (where they are copies), gradients, moments and masks."""
        pairs = list(zip(self._masters, self._parameters, strict=True))
        copies = sum(master.nbytes for master, parameter in pairs if parameter.dtype != torch.float32)
        gradients = sum(master.nbytes + parameter.nbytes for master, parameter in pairs)
        moments = sum(moment.nbytes for each in self._moments for moment in each)
        masks = sum(mask.nbytes for mask in self._masks if mask is not None)
        return copies + gradients + moments + masks + sum(kept.nbytes for kept in self._kept.values())

    def table(self, factors: Sequence[float]) -> Tensor:
        """What changes from step to step, float32 (steps, 3): the learning rate; by AdamW's formula the size of the
        step, and the root of what is to be corrected in the second moment. factors: of the learning rate, by step"""
        rows = []
        for number, factor in enumerate(factors, start=1):
            rate = self.recipe.learning_rate * factor
            rows.append((rate, rate / (1 - BETAS[0] ** number), (1 - BETAS[1] ** number) ** 0.5))
        return torch.tensor(rows, dtype=torch.float32, device=self._rate.device)

    def update(self, gradients: Sequence[Tensor], row_3: Tensor) -> None:
        """A step, with a row of the table."""
        others = [gradients[place] for place in self._others]
        with torch.no_grad():
            if others and self.compiles:
                # Before the kept ones: where this cannot be compiled, the whole step is taken again.
                self._compiled_step(others, row_3)
            elif self._fused is not None:
                self._fused_step(self._fused, others, row_3)
            for place, kept in self._kept.items():
                kept.step(gradients[place], row_3[SIZE], row_3[ROOT], BETAS, EPSILON)

    def check(self) -> None:
        """Raises NumericalError when a parameter is no longer finite."""
        check_finite(self._all, self.recipe.learning_rate)

    def _compiled_step(self, gradients: list[Tensor], row_3: Tensor) -> None:
        compiled(_masked_step)(
            self.recipe.optimizer,
            self._parameters,
            [master.detach() for master in self._masters],
            self._moments,
            self._masks,
            gradients,
            row_3,
            self.recipe.max_grad_norm,
        )

    def _fused_step(self, fused: torch.optim.Optimizer, gradients: list[Tensor], row_3: Tensor) -> None:
        self._rate.copy_(row_3[RATE])
        prepared = _prepared(gradients, self._masks, self.recipe.max_grad_norm)
        for master, gradient in zip(self._masters, prepared, strict=True):
            master.grad = gradient
        fused.step()
        for master in self._masters:
            master.grad = None
        _lower(self._parameters, [master.detach() for master in self._masters])


def _masked_step(
    optimizer: str,
    parameters: list[Tensor],
    masters: list[Tensor],
    moments: list[list[Tensor]],
    masks: list[Tensor | None],
    gradients: list[Tensor],
    row_3: Tensor,
    max_grad_norm: float | None,
) -> None:
    """A whole step, to be compiled: every tensor's part of it becomes one kernel."""
    prepared = _prepared(gradients, masks, max_grad_norm)
    if optimizer == "sgd":
        _sgd_step(masters, moments[0], prepared, row_3)
    else:
        _adamw_step(masters, moments[0], moments[1], prepared, row_3)
    _lower(parameters, masters)


def _adamw_step(
    masters: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    gradients: list[Tensor],
    row_3: Tensor,
) -> None:
    torch._foreach_lerp_(firsts, gradients, 1 - BETAS[0])
    torch._foreach_mul_(seconds, BETAS[1])
    torch._foreach_addcmul_(seconds, gradients, gradients, 1 - BETAS[1])
    roots = torch._foreach_sqrt(seconds)
    torch._foreach_div_(roots, row_3[ROOT])
    torch._foreach_add_(roots, EPSILON)
    changes = torch._foreach_div(firsts, roots)
    torch._foreach_mul_(changes, row_3[SIZE])
    torch._foreach_sub_(masters, changes)


def _sgd_step(masters: list[Tensor], momenta: list[Tensor], gradients: list[Tensor], row_3: Tensor) -> None:
    torch._foreach_mul_(momenta, MOMENTUM)
    torch._foreach_add_(momenta, gradients)
    torch._foreach_sub_(masters, torch._foreach_mul(momenta, row_3[RATE]))


def _prepared(
    gradients: list[Tensor], masks: list[Tensor | None], max_grad_norm: float | None
) -> list[Tensor]:
    """float32, zero where weights are removed, and clipped."""
    prepared = [
        gradient.float() if mask is None else gradient.float() * mask
        for gradient, mask in zip(gradients, masks, strict=True)
    ]
    if max_grad_norm is None:
        return prepared
    squares = torch.stack([gradient.square().sum() for gradient in prepared]).sum()
    clip = (max_grad_norm / (squares.sqrt() + NORM_EPSILON)).clamp(max=1.0)
    return [gradient.mul_(clip) for gradient in prepared]


def _lower(parameters: list[Tensor], masters: list[Tensor]) -> None:
    """Copies float32 masters to 16-bit parameters; those in float32 are their own masters."""
    for parameter, master in zip(parameters, masters, strict=True):
        if parameter.dtype != torch.float32:
            parameter.copy_(master)
