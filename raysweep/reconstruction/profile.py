"""What one step of a unit involves, found by taking one: its parameters, FLOPs and memory of activations."""

# B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raysweep.reconstruction.flops import flop_counter


@dataclass(frozen=True)
class UnitProfile:
    """parameters: names within the unit's module that the loss depends on
    step_flops:   of the matrix products and attention of one forward and backward pass
    saved_bytes:  of activations that the forward pass keeps for the backward pass
    """

    parameters: tuple[str, ...]
    step_flops: int
    saved_bytes: int


def profile_step(module: nn.Module, run: Callable[[Tensor], Tensor], input_BTH: Tensor) -> UnitProfile:
    """Takes one forward and backward pass of `run`, which runs `module`, and leaves the module as it was."""
    parameters = dict(module.named_parameters())
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters.values()}
    saved: dict[int, int] = {}  # bytes by address of storage

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    counter = flop_counter()
    try:
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            run(input_BTH).float().square().mean().backward()
        used = tuple(name for name, parameter in parameters.items() if _matters(parameter))
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    return UnitProfile(used, counter.get_total_flops(), sum(saved.values()))


def _matters(parameter: nn.Parameter) -> bool:
    """A norm that only ever sees the zeros of a silenced branch has a gradient, but nothing in it."""
    return parameter.grad is not None and bool(parameter.grad.count_nonzero())
