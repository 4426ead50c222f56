"""Which modules of a decoder are linears, how each stores its weight, and where the decoder's blocks are."""

# O outputs, I inputs of a linear

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from raysweep.errors import UsageError

ALLOWED_MODELS = "decoder-only language models of the transformers library"


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
    """The linears within `module` (itself under the empty name), by name, in order of definition."""
    return {name: child for name, child in module.named_modules() if _is_linear(child)}


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear, or a module of transformers' Conv1D kind: one (inputs, outputs) matrix and a bias."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def block_linears(block: nn.Module, prefix: str) -> dict[str, Linear]:
    """Every linear of a block by its full name. Raises UsageError for weights that are no plain matrix."""
    for name, parameter in block.named_parameters():
        if parameter.dim() > 2:
            raise UsageError(
                f"{prefix}.{name} has {parameter.dim()} dimensions (fused experts, or a convolution), "
                "which cannot be pruned yet",
                allowed="models whose decoder blocks hold ordinary linear layers",
            )
    return {
        f"{prefix}.{name}": Linear(f"{prefix}.{name}", module, transposed=not isinstance(module, nn.Linear))
        for name, module in linears_in(block).items()
    }


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks and their dotted name: the longest list of modules that all hold linears.

    A list inside another one (the experts of a block) does not count. Raises UsageError when there is none.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(linears_in, module))
    }
    if not lists:
        raise UsageError(
            f"{type(model).__name__} has no list of decoder blocks that hold linear layers",
            allowed=ALLOWED_MODELS,
        )
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    longest = max(outer, key=lambda name: len(lists[name]))
    return longest, lists[longest]
