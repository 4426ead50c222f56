"""Experts that transformers keeps in one tensor, taken apart: every expert has linears of its own, like any other.

Masks, statistics and reconstruction then need no rule for experts. A linear of an expert sees exactly the tokens that
are routed to it, and runs on none of them where there are none, so that it always has a place in the graph.
"""

# E experts, N tokens, S slots (tokens * experts of a token), K experts of a token, H hidden, O outputs, I inputs

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SORTED_CLASSES = (
    "Llama4TextExperts",
)  # take all tokens once for every expert, zeros where it is not the token's
GATED, UNGATED, DOWN = "gate_up_proj", "up_proj", "down_proj"
BIAS = "_bias"


@dataclass(frozen=True)
class FusedPlace:
    """Where a tensor of an expert lies in the model as transformers builds it.

    name: of the tensor with all experts;  index: which expert;  transposed: whether it lies there as (I, O)
    """

    name: str
    index: int
    transposed: bool


class Expert(nn.Module):
    """One expert: down(gate(up x)). Its weights are views of the fused ones."""

    def __init__(self, fused: nn.Module, index: int) -> None:
        super().__init__()
        self.first = _first_of(fused)
        for name in (self.first, DOWN):
            self.add_module(name, _linear(fused, name, index))

    def forward(self, x_NH: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        inner = gate(self.get_submodule(self.first)(x_NH))
        out_NH: Tensor = self.get_submodule(DOWN)(inner)
        return out_NH


class Experts(nn.Module):
    """Stands in for a module of fused experts and gives what it gives. Experts are its children, by number.

    Attributes that the model reads off the fused one are those of the fused one, whose gate it also uses.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        rule = copy.copy(fused)
        rule._parameters = {}
        self.__dict__["rule"] = rule  # no submodule: nothing in it has weights
        self.count = fused.get_parameter(DOWN).shape[0]
        self.transposed = _is_transposed(fused)
        for index in range(self.count):
            self.add_module(str(index), Expert(fused, index))
        self.train(fused.training)

    def forward(
        self, hidden_NH: Tensor, experts_NK: Tensor | None = None, weights_NK: Tensor | None = None
    ) -> Tensor:
        if experts_NK is None or weights_NK is None:
            return self._of_sorted(hidden_NH)
        slots_S = torch.argsort(experts_NK.reshape(-1), stable=True)
        counts = torch.bincount(experts_NK.reshape(-1), minlength=self.count).tolist()[: self.count]
        weights_S = weights_NK.reshape(-1)
        out_NH = torch.zeros_like(hidden_NH)
        for index, slots in enumerate(slots_S[: sum(counts)].split(counts)):
            tokens = slots // experts_NK.shape[1]
            part = self._run(index, hidden_NH[tokens]) * weights_S[slots, None]
            out_NH.index_add_(0, tokens, part.to(out_NH.dtype))
        return out_NH

    def _of_sorted(self, hidden_SH: Tensor) -> Tensor:
        """hidden_SH: all tokens for the first expert, then for the second; those that are not an expert's are zero, and
        zero is what it makes of them."""
        hidden_ENH = hidden_SH.view(self.count, -1, hidden_SH.shape[-1])
        given: list[Tensor] = []
        for index, hidden_NH in enumerate(hidden_ENH):
            (tokens,) = torch.where((hidden_NH != 0).any(-1))
            given.append(
                torch.zeros_like(hidden_NH).index_add(0, tokens, self._run(index, hidden_NH[tokens]))
            )
        return torch.cat(given)

    def _run(self, index: int, x_NH: Tensor) -> Tensor:
        expert: Any = self._modules[str(index)]
        out_NH: Tensor = expert(x_NH, self._gate)
        return out_NH

    def _gate(self, inner: Tensor) -> Tensor:
        rule: Any = self.__dict__["rule"]
        gated: Tensor
        if type(rule).__name__ in SORTED_CLASSES:
            gate, up = inner.chunk(2, dim=-1)
            gated = up * rule.act_fn(gate)
        else:
            gated = rule._apply_gate(inner) if rule.has_gate else rule.act_fn(inner)
        return gated

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["rule"], name)


def separate_experts(model: nn.Module) -> None:
    """Puts experts with linears of their own in the place of fused ones, in a model without weights."""
    for name, module in list(model.named_modules()):
        if is_fused(module):
            model.set_submodule(name, Experts(module))


def separated(module: nn.Module) -> nn.Module:
    """The module with its experts apart; itself where it has none that are fused. It shares all weights, and the given
    one stays as it is."""
    if is_fused(module):
        return Experts(module)
    children = {name: child for name, child in module._modules.items() if child is not None}
    apart = {name: separated(child) for name, child in children.items()}
    if all(apart[name] is child for name, child in children.items()):
        return module
    clone = copy.copy(module)
    clone._modules = {**module._modules, **apart}
    return clone


def fused_places(model: nn.Module) -> dict[str, FusedPlace]:
    """For every tensor of an expert, by its full name, where it lay before experts were taken apart."""
    places: dict[str, FusedPlace] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Experts):
            for name, _ in module.named_parameters():
                index, linear, kind = name.split(".")
                fused = f"{prefix}.{linear}{BIAS if kind == 'bias' else ''}"
                transposed = module.transposed and kind == "weight"
                places[f"{prefix}.{name}"] = FusedPlace(fused, int(index), transposed)
    return places


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter of that full name; of an expert's, in a model whose experts are fused, its part, a view."""
    path = name.rsplit(".", 3)
    if len(path) == 4 and path[1].isdigit():
        owner = model.get_submodule(path[0])
        if is_fused(owner):
            return _part(owner, path[2], int(path[1]), path[3])
    return model.get_parameter(name)


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts in one tensor each, and nothing else, by the conventions of
    transformers' experts or of a class that is known here."""
    known = hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    if not (known or type(module).__name__ in SORTED_CLASSES) or getattr(
        module, "has_post_expert_norm", False
    ):
        return False
    names = {name for name, _ in module.named_parameters()}
    first = _first_of(module)
    allowed = {first, DOWN, first + BIAS, DOWN + BIAS}
    if not {first, DOWN} <= names <= allowed or any(True for _ in module.buffers()):
        return False
    up, down = module.get_parameter(first), module.get_parameter(DOWN)
    return up.dim() == down.dim() == 3 and up.shape[0] == down.shape[0]


def _first_of(fused: nn.Module) -> str:
    return GATED if GATED in fused._parameters else UNGATED


def _is_transposed(fused: nn.Module) -> bool:
    return type(fused).__name__ in SORTED_CLASSES or bool(fused.is_transposed)


def _part(fused: nn.Module, linear: str, index: int, kind: str) -> Tensor:
    """An expert's weight (O, I) or bias (O,), a view."""
    if kind == "bias":
        return fused.get_parameter(linear + BIAS).detach()[index]
    part = fused.get_parameter(linear).detach()[index]
    return part.T if _is_transposed(fused) else part


def _linear(fused: nn.Module, name: str, index: int) -> nn.Linear:
    """One matrix of one expert, with its bias, where experts have some."""
    weight_OI = _part(fused, name, index, "weight")
    has_bias = name + BIAS in fused._parameters
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=has_bias, device="meta")
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    if has_bias:
        linear.bias = nn.Parameter(_part(fused, name, index, "bias"), requires_grad=False)
    return linear
