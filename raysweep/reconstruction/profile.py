"""What one step of a unit involves, found by taking one: its parameters, its FLOPs, the memory of its activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


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
    saved: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters.values()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with flop_counter() as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        run(input_BTH).float().square().mean().backward()
    used = tuple(name for name, parameter in parameters.items() if _matters(parameter))
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    return UnitProfile(used, counter.get_total_flops(), sum(saved.values()))


def flop_counter() -> FlopCounterMode:
    """Counts products and attention, on a CPU as well."""
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


def _matters(parameter: nn.Parameter) -> bool:
    """A norm that only ever sees the zeros of a silenced branch has a gradient, but nothing in it."""
    return parameter.grad is not None and bool(parameter.grad.count_nonzero())


def _forward_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops,
}
