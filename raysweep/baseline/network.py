"""The whole model as retraining sees it: start weights, masks on gradients, and what is trained."""

# O outputs, I inputs of a linear, R rank; B samples, T tokens, V vocabulary

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from raysweep.config.field_groups import LORA
from raysweep.config.trial import Trial
from raysweep.model.linears import Linear, block_linears, find_blocks
from raysweep.reconstruction.trainable import low_rank_factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MaskedLowRank(nn.Module):
    """A linear whose weight W is changed by (alpha / rank) * mask . (B A); W itself and its bias are frozen.

    The change and the mask are in the layout in which the linear stores its weight.
    """

    def __init__(self, linear: Linear, mask: Tensor | None, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.weight = linear.module.get_parameter("weight")
        self.bias = getattr(linear.module, "bias", None)
        self.transposed, self.scale = linear.transposed, alpha / rank
        self.mask: Tensor | None
        self.register_buffer("mask", mask, persistent=False)
        outer, inner = low_rank_factors(linear, rank, seed)
        self.outer_OR = nn.Parameter(outer.detach().to(self.weight.dtype))
        self.inner_RI = nn.Parameter(inner.detach().to(self.weight.dtype))

    def merged(self) -> Tensor:
        """The weight as it runs, in the layout in which it is stored."""
        change = self.scale * (self.outer_OR @ self.inner_RI)
        change = change.T if self.transposed else change
        return self.weight + (change if self.mask is None else change * self.mask)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.merged()
        return functional.linear(x, weight.T if self.transposed else weight, self.bias)


def linears_of(model: nn.Module) -> dict[str, Linear]:
    """Every linear of the decoder blocks by its full name."""
    prefix, blocks = find_blocks(model)
    found: dict[str, Linear] = {}
    for index, block in enumerate(blocks):
        found |= block_linears(block, f"{prefix}.{index}")
    return found


def begin_training(model: PreTrainedModel, trial: Trial, masks: Mapping[str, Tensor]) -> list[nn.Parameter]:
    """Makes the model ready to be trained as the trial says; returns what is trained.

    masks: by linear, bool in the layout of its weight, True = kept. The weights hold zeros there already; gradients of
    removed ones are set to zero as they arise, so that they never move, in whatever copies an optimizer keeps.
    """
    linears = linears_of(model)
    model.requires_grad_(False)
    if trial.trainable in LORA:
        return _low_rank(model, trial, linears, masks)
    prefix, _ = find_blocks(model)
    weights = {f"{name}.weight" for name in linears}
    trained: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = name.startswith(f"{prefix}.")
        if trial.trainable == "all" or (inside and (trial.trainable == "blocks" or name in weights)):
            parameter.requires_grad_(True)
            trained.append(parameter)
    for name, mask in masks.items():
        _mask_gradient(linears[name].module.get_parameter("weight"), mask)
    return trained


def _mask_gradient(parameter: nn.Parameter, mask: Tensor) -> None:
    kept = mask.to(parameter.device)
    parameter.register_hook(lambda gradient: gradient * kept)


def _low_rank(
    model: PreTrainedModel, trial: Trial, linears: Mapping[str, Linear], masks: Mapping[str, Tensor]
) -> list[nn.Parameter]:
    prefix, _ = find_blocks(model)
    trained: list[nn.Parameter] = []
    if trial.trainable == "lora+norms":
        of_linears = {id(p) for linear in linears.values() for p in linear.module.parameters()}
        trained += [
            parameter
            for name, parameter in model.named_parameters()
            if name.startswith(f"{prefix}.") and id(parameter) not in of_linears
        ]
        for parameter in trained:
            parameter.requires_grad_(True)
    for name, linear in linears.items():
        mask = masks.get(name)
        device = linear.module.get_parameter("weight").device
        changed = MaskedLowRank(
            linear,
            None if mask is None else mask.to(device),
            trial.lora_rank or 1,
            trial.lora_alpha or 0.0,
            trial.seed or 0,
        )
        model.set_submodule(name, changed)
        trained += [changed.outer_OR, changed.inner_RI]
    return trained


def without_dropout(model: nn.Module, checkpointing: bool) -> None:
    """In evaluation mode, so that nothing is dropped. Gradient checkpointing asks each module for its own mode."""
    model.eval()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Sum of the next-token losses over T - 1 targets a sample, float32."""
    scores_NV = logits_BTV[:, :-1].float().flatten(0, 1)
    return functional.cross_entropy(scores_NV, ids_BT[:, 1:].flatten(), reduction="sum")


def distillation_loss(logits_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
    """Sum over tokens of the divergence KL(dense || pruned) of the next-token distributions, float32 (Hinton et al.,
    arXiv 1503.02531, at temperature 1)."""
    student_NV = functional.log_softmax(logits_BTV.float().flatten(0, 1), -1)
    teacher_NV = functional.log_softmax(teacher_BTV.float().flatten(0, 1), -1)
    return functional.kl_div(student_NV, teacher_NV, reduction="sum", log_target=True)


def loss_elements(trial: Trial, samples: int, tokens: int) -> int:
    """What the sum of a loss over so many samples is divided by."""
    return samples * (tokens if trial.loss == "distillation" else tokens - 1)


def total_loss(model: nn.Module, teacher: nn.Module | None, ids_BT: Tensor, **inputs: Tensor) -> Tensor:
    """The trial's loss over some samples, summed: distillation where there is a teacher. inputs: others of the model"""
    logits_BTV = model(input_ids=ids_BT, use_cache=False, **inputs).logits
    if teacher is None:
        return next_token_loss(logits_BTV, ids_BT)
    with torch.no_grad():
        teacher_BTV = teacher(input_ids=ids_BT, use_cache=False, **inputs).logits
    return distillation_loss(logits_BTV, teacher_BTV)
