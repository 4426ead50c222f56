"""What one step of a unit involves, found by taking one: its parameters, FLOPs and memory of activations."""

# B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor, nn

from raysweep.reconstruction.entry_norm import EntryNorm, Watch
from raysweep.reconstruction.flops import flop_counter

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class UnitProfile:
    """parameters: names within the unit's module that the loss depends on
    step_flops:   of the matrix products and attention of one forward and backward pass
    saved_bytes:  of activations that the forward pass keeps for the backward pass, without its input
    entry_norms:  whose gradients need no pass back through the linears behind them
    """

    parameters: tuple[str, ...]
    step_flops: int
    saved_bytes: int
    entry_norms: tuple[EntryNorm, ...]


def profile_step(module: nn.Module, run: Run, input_BTH: Tensor, routed: tuple[str, ...] = ()) -> UnitProfile:
    """Takes a forward and backward pass of `run`, which runs `module`, and leaves the module as it was.

    routed: what names of parameters of experts begin with: other samples may be routed to them
    """
    parameters = dict(module.named_parameters())
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        watch = Watch(module)
        with flop_counter() as counter, watch.watching(input_BTH):
            run(input_BTH).float().square().mean().backward()
        of_experts = {name for name in parameters if name.startswith(routed)}
        experts_run = any(parameters[name].grad is not None for name in of_experts)
        used = tuple(
            name
            for name, parameter in parameters.items()
            if _matters(parameter) or (experts_run and name in of_experts)
        )
        entry_norms = watch.found()
        saved = saved_sizes(lambda: run(input_BTH).float().square().mean())
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    for given in (input_BTH, *parameters.values()):
        saved.pop(given.untyped_storage()._cdata, None)
    return UnitProfile(used, counter.get_total_flops(), sum(saved.values()), entry_norms)


class _Saved:
    """What a forward pass saved; ends with the part of the graph that it belongs to.

    The memory alone: a tensor knows the step that gave it, and one that is saved by this very step would never end.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.untyped_storage()


def saved_sizes(loss_of: Callable[[], Tensor]) -> dict[int, int]:
    """Bytes by identity of the storages that a forward pass keeps: not those of branches that lead nowhere.

    A pass without a FLOP counter, which keeps references of its own.
    """
    kept: WeakSet[_Saved] = WeakSet()

    def save(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(save, _no_way_back):
        loss = loss_of()
    sizes = {saved.storage._cdata: saved.storage.nbytes() for saved in kept}
    del loss  # until here it held the graph
    return sizes


def _no_way_back(saved: _Saved) -> Tensor:
    raise RuntimeError("a pass that is only looked at has no backward pass")


def _matters(parameter: nn.Parameter) -> bool:
    """A norm that only ever sees the zeros of a silenced branch has a gradient, but nothing in it."""
    return parameter.grad is not None and bool(parameter.grad.count_nonzero())
