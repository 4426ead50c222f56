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

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

AGREEMENT = 1e-4  # of a norm's gradient by autograd on a probe, relative
ROUGH_AGREEMENT = 0.01  # the same in 16 bits, whose rounding was found to make 0.002 of it


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
        self._behind: dict[str, list[str]] = defaultdict(list)  # weights of the linears that took it
        self._busy = False

    @contextmanager
    def watching(self, input_BTH: Tensor) -> Iterator[None]:
        """Within the context the module runs on `input_BTH`."""

        def see(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(part: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
                if self._busy or not arguments or not isinstance(output, Tensor):
                    return
                if isinstance(part, nn.Linear):
                    for norm, given in self._given.items():
                        if _same(arguments[0], given):
                            self._behind[norm].append(f"{name}.weight")
                elif _equal(arguments[0], input_BTH) and self._is_proportional(part, input_BTH, output):
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
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        found = []
        for norm, weights in self._behind.items():
            behind = [parameters[name] for name in weights]
            apart = len({id(weight) for weight in behind}) == len(behind)  # else each gradient is both's
            if apart and _agrees(parameters[norm], behind):
                found.append(EntryNorm(norm, tuple(weights)))
        return tuple(found)

    @torch.no_grad()
    def _is_proportional(self, norm: nn.Module, input_BTH: Tensor, output: Tensor) -> bool:
        """Whether twice the weight gives exactly twice the output, as it does in every format, unless it is 1 + w."""
        self._busy = True
        try:
            weight = norm.get_parameter("weight")
            doubled = functional_call(norm, {"weight": 2 * weight}, (input_BTH,))
        finally:
            self._busy = False
        return torch.equal(doubled, 2 * output)


def norm_gradient(norm: Tensor, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Of a norm's weight, float32 (H,); weights: (O, H) of every linear, as they ran, and their gradients.

    Where the norm's weight is zero it is zero too, which is wrong but for a set of weights of measure zero.
    """
    total_H = torch.zeros_like(norm, dtype=torch.float32)
    for weight_OH, gradient_OH in zip(weights, gradients, strict=True):
        total_H = total_H + (weight_OH.float() * gradient_OH).sum(0)  # a product in 16 bits may vanish
    return torch.where(norm == 0, 0.0, total_H / norm.float())


def _agrees(norm: nn.Parameter, weights: Sequence[nn.Parameter]) -> bool:
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if norm.grad is None or len(gradients) < len(weights) or not bool((norm != 0).all()):
        return False
    if any(weight.shape[1] != norm.numel() for weight in weights):
        return False
    ours, theirs = norm_gradient(norm.detach(), [w.detach() for w in weights], gradients), norm.grad.float()
    limit = AGREEMENT if norm.dtype == torch.float32 else ROUGH_AGREEMENT
    return bool((ours - theirs).norm() <= limit * theirs.norm())


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _same(one: Tensor, other: Tensor) -> bool:
    """Numbers in one place, perhaps with samples and tokens in one dimension."""
    in_place = one.data_ptr() == other.data_ptr() and one.numel() == other.numel()
    return in_place and one.shape[-1] == other.shape[-1]
