"""Which modules of a decoder are linears, how each stores its weight, and where the decoder's blocks are."""

# O outputs, I inputs of a linear

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from raysweep.errors import UsageError
from raysweep.model.experts import Experts, is_fused

ALLOWED_MODELS = "decoder-only language models of the transformers library"
_ROUTER = re.compile(r"(^|_)(router|gate)$")  # of attributes: router, gate, shared_expert_gate
_ROUTER_CLASS = re.compile(r"Router|Gate$")


@dataclass(frozen=True)
class Linear:
    """One weight matrix that can be pruned. `transposed`: stored as (inputs, outputs), as GPT-2 does."""

    name: str
    module: nn.Module
    transposed: bool

    @property
    def weight_OI(self) -> Tensor:
        """The weight as (outputs, inputs); a view of the stored one."""
        return self.from_stored(self.module.get_parameter("weight").detach())

    @property
    def bias_O(self) -> Tensor | None:
        """The bias, (outputs,); a view of the stored one."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the weight as the module keeps it."""
        return tuple(self.module.get_parameter("weight").shape)

    def as_stored(self, tensor_OI: Tensor) -> Tensor:
        """`tensor_OI` in the layout in which the module keeps its weight, contiguous."""
        return (tensor_OI.T if self.transposed else tensor_OI).contiguous()

    def from_stored(self, stored: Tensor) -> Tensor:
        """A tensor in the module's layout as (outputs, inputs); a view."""
        return stored.T if self.transposed else stored


def linears_in(module: nn.Module) -> dict[str, nn.Module]:
    """The linears within `module` (itself under the empty name), by name, in order of definition.

    Not those that choose experts or weigh them.
    """
    routers = _routers_in(module)
    return {
        name: child
        for name, child in module.named_modules()
        if _is_linear(child)
        and not any(name == router or name.startswith(f"{router}.") for router in routers)
    }


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear, or a module of transformers' Conv1D kind: one (inputs, outputs) matrix and a bias."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _routers_in(module: nn.Module) -> list[str]:
    """Names of what lies beside experts and is called a router or a gate, by its attribute or its class."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, holder in module.named_modules()
        if any(_holds_experts(name, child) for name, child in holder.named_children())
        for name, child in holder.named_children()
        if _ROUTER.search(name) or _ROUTER_CLASS.search(type(child).__name__)
    ]


def _holds_experts(name: str, module: nn.Module) -> bool:
    return isinstance(module, Experts) or is_fused(module) or (name == "experts" and _is_list(module))


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def routed_in(module: nn.Module) -> dict[str, int]:
    """Names of the linears within `module` that belong to experts, with the number of experts beside them."""
    found: dict[str, int] = {}
    for prefix, holder in module.named_modules():
        for name, child in holder.named_children():
            if isinstance(child, Experts) or (name == "experts" and _is_list(child)):
                count = child.count if isinstance(child, Experts) else len(list(child.children()))
                path = f"{prefix}.{name}" if prefix else name
                found |= {f"{path}.{linear}": count for linear in linears_in(child)}
    return found


def block_linears(block: nn.Module, prefix: str) -> dict[str, Linear]:
    """Every linear of a block by its full name, but for those that choose experts.

    Short convolutions are left as they are. Raises UsageError for weights that are no plain matrix, and where most of
    them lie in no linear.
    """
    linears = linears_in(block)
    weights = {id(module.get_parameter("weight")) for module in linears.values()}
    others = {n: p for n, p in _without_convolutions(block) if id(p) not in weights and p.dim() > 1}
    for name, parameter in others.items():
        if parameter.dim() > 2:
            raise UsageError(
                f"{prefix}.{name} has {parameter.dim()} dimensions: fused experts of an unknown kind, or the like",
                allowed="models whose decoder blocks hold linear layers, or experts as most of transformers' models do",
            )
    largest = max(others, key=lambda name: others[name].numel(), default=None)
    prunable = sum(module.get_parameter("weight").numel() for module in linears.values())
    if largest is not None and sum(other.numel() for other in others.values()) > prunable:
        raise UsageError(
            f"most weights of {prefix} lie in no linear layer, such as {prefix}.{largest}, so they could not be pruned",
            allowed="models whose decoder blocks hold linear layers, or experts as most of transformers' models do",
        )
    return {
        f"{prefix}.{name}": Linear(f"{prefix}.{name}", module, transposed=not isinstance(module, nn.Linear))
        for name, module in linears.items()
    }


def _without_convolutions(block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The block's parameters, by name, but for those of convolutions over a few tokens."""
    skipped = {
        id(p) for module in block.modules() if isinstance(module, nn.Conv1d) for p in module.parameters()
    }
    return ((name, p) for name, p in block.named_parameters() if id(p) not in skipped)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks and their dotted name: the longest list of modules that all hold linears.

    A list inside another one (the experts of a block) does not count, and in a model with other parts than text only
    what lies in its text decoder. Raises UsageError when there is none.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(linears_in, module))
    }
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    text = _text_prefix(model)
    inside = [name for name in outer if name.startswith(text)]
    if not inside:
        raise UsageError(
            f"{type(model).__name__} has no list of decoder blocks that hold linear layers",
            allowed=ALLOWED_MODELS,
        )
    longest = max(inside, key=lambda name: len(lists[name]))
    return longest, lists[longest]


def _text_prefix(model: nn.Module) -> str:
    """Of the names of what belongs to the text decoder of a model for text and other things; empty for others."""
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return ""
    decoder = model.get_decoder()  # type: ignore[operator]
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
