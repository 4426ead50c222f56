"""The norm that a unit begins with: its gradient follows from those of the weights behind it, without a product.

Let y = g * u be what a norm with weight g makes of the unit's input, and let linears alone take y. The gradient of a
weight W behind it is the sum over tokens of dL/do_o y_j, so that

    sum over o of W_oj dL/dW_oj  =  sum over tokens of y_j dL/dy_j  =  g_j dL/dg_j,

summed over those linears. With g out of the graph nothing asks for the gradient of y any more, which takes a product of
the size of the forward one for each of them: a third of the backward pass of the first half of a gated MLP, and half of
that of queries, keys and values.
"""

# O outputs, I inputs of a linear; B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative, with the gradient by autograd on a probe
ROUGH_AGREEMENT = 0.1  # in 16 bits; something else that takes the norm's output changes it altogether


@dataclass(frozen=True)
class EntryNorm:
    """Names of parameters within a module: a norm's weight, and those of the linears that take what it gives."""

    norm: str
    weights: tuple[str, ...]


class Watch:
    """Sees which norms take a module's input, and which linears take what these give, while the module runs once.

    The MLP half of a block is its input and a silenced attention's zeros: numbers tell, not the tensor's identity.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._given: dict[str, Tensor] = {}  # what a norm gave, by the name of its weight
        self._taken: list[tuple[str, Tensor]] = []  # what a linear took

    @contextmanager
    def watching(self, input_BTH: Tensor) -> Iterator[None]:
        """Within the context the module runs on `input_BTH`."""

        def see(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(part: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
                if not arguments or not isinstance(output, Tensor):
                    return
                if isinstance(part, nn.Linear):
                    self._taken.append((f"{name}.weight", arguments[0]))
                elif arguments[0].shape == input_BTH.shape and torch.equal(arguments[0], input_BTH):
                    self._given[f"{name}.weight"] = output

            return hook

        leaves = [(name, part) for name, part in self._module.named_modules() if not any(part.children())]
        handles = [
            part.register_forward_hook(see(name))
            for name, part in leaves
            if isinstance(part, nn.Linear) or [n for n, _ in part.named_parameters()] == ["weight"]
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def found(self) -> tuple[EntryNorm, ...]:
        """Norms whose gradients, which the module's parameters hold by now, are what the weights behind them say."""
        parameters = dict(self._module.named_parameters())
        found = []
        for norm, given in self._given.items():
            weights = tuple(name for name, taken in self._taken if _same(taken, given))
            if weights and _agrees(parameters[norm], [parameters[name] for name in weights]):
                found.append(EntryNorm(norm, weights))
        return tuple(found)


def norm_gradient(norm: Tensor, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Of a norm's weight, float32 (H,); weights: (O, H) of every linear, as they ran, and their gradients.

    Where the norm's weight is zero it is zero too, which is wrong but for a set of weights of measure zero.
    """
    total_H = torch.zeros_like(norm, dtype=torch.float32)
    for weight_OH, gradient_OH in zip(weights, gradients, strict=True):
        total_H = total_H + (weight_OH * gradient_OH).sum(0, dtype=torch.float32)
    return torch.where(norm == 0, 0.0, total_H / norm.float())


def _agrees(norm: nn.Parameter, weights: Sequence[nn.Parameter]) -> bool:
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if norm.grad is None or len(gradients) < len(weights) or not bool((norm != 0).all()):
        return False
    ours, theirs = norm_gradient(norm.detach(), [w.detach() for w in weights], gradients), norm.grad.float()
    limit = AGREEMENT.get(norm.dtype, ROUGH_AGREEMENT)
    return bool((ours - theirs).norm() <= limit * theirs.norm())


def _same(one: Tensor, other: Tensor) -> bool:
    """Numbers in one place, perhaps seen in another shape."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()
