"""Steps under a mask on a GPU: a few kernels for all tensors of a unit, with nothing read back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysweep.reconstruction.optimizer import MOMENTUM, NORM_EPSILON, check_finite, master_of
from raysweep.reconstruction.programs import compiled
from raysweep.reconstruction.training import TrainingRecipe

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's own, as `MaskedOptimizer` has them


class DeviceOptimizer:
    """As `MaskedOptimizer`, for gradients that arrive together: in the parameters' dtype, not yet masked.

    masks: for every parameter a tensor of its shape, bool, True = kept, or None
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        parameters: Sequence[nn.Parameter],
        masks: Sequence[Tensor | None],
        compiles: bool,
    ) -> None:
        self.recipe = recipe
        step = _sgd_step if recipe.optimizer == "sgd" else _adamw_step
        self._step = compiled(step) if compiles else step
        self._parameters = [parameter.detach() for parameter in parameters]  # the same storage
        self._masters = [
            parameter if parameter.dtype == torch.float32 else master_of(parameter).detach()
            for parameter in self._parameters
        ]
        self._masks = [None if mask is None else mask.to(parameters[0].device) for mask in masks]
        moments = 1 if recipe.optimizer == "sgd" else 2
        self._moments = [[torch.zeros_like(master) for master in self._masters] for _ in range(moments)]

    @property
    def nbytes(self) -> int:
        """Bytes of float32 masters (where they are copies), gradients, moments and masks."""
        copies = sum(
            master.nbytes
            for master, parameter in zip(self._masters, self._parameters, strict=True)
            if master is not parameter
        )
        gradients = sum(parameter.nbytes for parameter in self._parameters)
        moments = sum(moment.nbytes for each in self._moments for moment in each)
        return copies + gradients + moments + sum(mask.nbytes for mask in self._masks if mask is not None)

    def table(self, factors: Sequence[float]) -> Tensor:
        """What changes from step to step, float32 (steps, 2): the size of the step, and the root of what is to be
        corrected in the second moment. factors: of the learning rate, by step"""
        rows = []
        for number, factor in enumerate(factors, start=1):
            rate = self.recipe.learning_rate * factor
            if self.recipe.optimizer == "sgd":
                rows.append((rate, 1.0))
            else:
                rows.append((rate / (1 - BETAS[0] ** number), (1 - BETAS[1] ** number) ** 0.5))
        return torch.tensor(rows, dtype=torch.float32, device=self._parameters[0].device)

    def update(self, gradients: Sequence[Tensor], row_2: Tensor) -> None:
        """A step, with a row of the table."""
        with torch.no_grad():
            self._step(
                self._parameters,
                self._masters,
                self._moments,
                self._masks,
                list(gradients),
                row_2,
                self.recipe.max_grad_norm,
            )

    def check(self) -> None:
        """Raises NumericalError when a parameter is no longer finite."""
        check_finite(self._parameters, self.recipe.learning_rate)


def _adamw_step(
    parameters: list[Tensor],
    masters: list[Tensor],
    moments: list[list[Tensor]],
    masks: list[Tensor | None],
    gradients: list[Tensor],
    row_2: Tensor,
    max_grad_norm: float | None,
) -> None:
    firsts, seconds = moments
    gradients = _prepared(gradients, masks, max_grad_norm)
    torch._foreach_lerp_(firsts, gradients, 1 - BETAS[0])
    torch._foreach_mul_(seconds, BETAS[1])
    torch._foreach_addcmul_(seconds, gradients, gradients, 1 - BETAS[1])
    roots = torch._foreach_sqrt(seconds)
    torch._foreach_div_(roots, row_2[1])
    torch._foreach_add_(roots, EPSILON)
    changes = torch._foreach_div(firsts, roots)
    torch._foreach_mul_(changes, row_2[0])
    torch._foreach_sub_(masters, changes)
    _lower(parameters, masters)


def _sgd_step(
    parameters: list[Tensor],
    masters: list[Tensor],
    moments: list[list[Tensor]],
    masks: list[Tensor | None],
    gradients: list[Tensor],
    row_2: Tensor,
    max_grad_norm: float | None,
) -> None:
    (momenta,) = moments
    torch._foreach_mul_(momenta, MOMENTUM)
    torch._foreach_add_(momenta, _prepared(gradients, masks, max_grad_norm))
    torch._foreach_sub_(masters, torch._foreach_mul(momenta, row_2[0]))
    _lower(parameters, masters)


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
    return [gradient * clip for gradient in prepared]


def _lower(parameters: list[Tensor], masters: list[Tensor]) -> None:
    """Copies float32 masters to 16-bit parameters; those in float32 are their own masters."""
    for parameter, master in zip(parameters, masters, strict=True):
        if parameter.dtype != torch.float32:
            parameter.copy_(master)
