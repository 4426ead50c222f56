"""What training on one sample takes, found on tensors without storage: nothing is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raysweep.baseline.network import begin_training, total_loss, without_dropout
from raysweep.config.trial import Trial
from raysweep.reconstruction.flops import flop_counter
from raysweep.reconstruction.profile import saved_sizes


@dataclass(frozen=True)
class SampleProfile:
    """flops: of the products of a forward and a backward pass, the teacher's forward included

    saved_bytes: what the forward pass keeps for the backward pass besides parameters
    """

    flops: int
    saved_bytes: int


def profile_sample(model: nn.Module, teacher: nn.Module | None, trial: Trial, tokens: int) -> SampleProfile:
    """Of a sample of so many tokens. The models are left as they are."""
    ghost, ghost_teacher = _without_storage(model), None if teacher is None else _without_storage(teacher)
    without_dropout(ghost, bool(trial.gradient_checkpointing))
    begin_training(ghost, trial, {})
    ids_BT = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    # A mask in its last form: models look at the values of any other, and here there are none.
    mask = torch.zeros(1, 1, tokens, tokens, dtype=next(ghost.parameters()).dtype, device="meta")

    def loss() -> Tensor:
        return total_loss(ghost, ghost_teacher, ids_BT, attention_mask=mask)

    with flop_counter() as counter:
        loss().backward()
    return SampleProfile(int(counter.get_total_flops()), _saved_bytes(ghost, loss))


def _saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    saved = saved_sizes(loss)
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage()._cdata, None)
    return sum(saved.values())


def _without_storage(model: nn.Module) -> Any:
    """A copy on the device `meta`."""
    parameters = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo=parameters).to("meta")
