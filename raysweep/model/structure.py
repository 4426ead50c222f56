"""The parts of a decoder found by structure, not by a list of names: blocks, linears, and the two halves of a block."""

# B samples, T tokens of a sample, H hidden

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from raysweep.errors import UsageError

BlockArguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""What a block takes besides the hidden states: positional and keyword arguments."""


@dataclass(frozen=True)
class Linear:
    """One weight matrix that can be pruned. `transposed`: stored as (inputs, outputs), as GPT-2 does."""

    name: str
    module: nn.Module
    transposed: bool

    @property
    def weight_OI(self) -> Tensor:
        """The weight as (outputs, inputs); a view of the stored one."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[union-attr, operator, assignment]
        return weight.T if self.transposed else weight

    def as_stored(self, tensor_OI: Tensor) -> Tensor:
        """`tensor_OI` in the layout in which the module keeps its weight, contiguous."""
        return (tensor_OI.T if self.transposed else tensor_OI).contiguous()

    def from_stored(self, stored: Tensor) -> Tensor:
        return stored.T if self.transposed else stored

    @property
    def bias_O(self) -> Tensor | None:
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        return None if bias is None else bias.detach()


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks and their dotted name: the longest list of modules that hold linears, outermost first."""
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_linears(child) for child in module)
    ]
    if not candidates:
        raise UsageError(
            f"{type(model).__name__} has no list of decoder blocks that hold linear layers",
            allowed="decoder-only language models of the transformers library",
        )
    return max(candidates, key=lambda found: (len(found[1]), -found[0].count(".")))


def block_linears(block: nn.Module, prefix: str) -> dict[str, Linear]:
    """Every linear of a block by its full name. Refuses weights that are no plain matrix (fused experts)."""
    fused = [name for name, parameter in block.named_parameters() if parameter.dim() > 2]
    if fused:
        raise UsageError(
            f"{prefix}.{fused[0]} fuses several matrices into one tensor, which cannot be pruned yet",
            allowed="models whose decoder blocks hold ordinary linear layers",
        )
    return {
        f"{prefix}.{name}": Linear(f"{prefix}.{name}", module, transposed=not isinstance(module, nn.Linear))
        for name, module in _linears(block).items()
    }


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_modules() if _is_linear(child)}


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear, or a module of transformers' Conv1D kind: one (inputs, outputs) matrix and a bias."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a block returned, alone or first in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class Block:
    """One decoder block with its place in the model, its linears and, found on first use, its halves.

    `arguments(B, T)` gives what the block takes besides hidden states of shape (B, T, H).
    """

    def __init__(
        self,
        module: nn.Module,
        prefix: str,
        index: int,
        hidden_size: int,
        arguments: Callable[[int, int], BlockArguments],
    ) -> None:
        self.module, self.prefix, self.index = module, prefix, index
        self.hidden_size = hidden_size
        self.linears = block_linears(module, prefix)
        self._arguments = arguments

    def run(self, hidden_BTH: Tensor, module: nn.Module | None = None) -> Tensor:
        """The output hidden states (B, T, H) of the block, or of one of its halves."""
        arguments, keywords = self._arguments(hidden_BTH.shape[0], hidden_BTH.shape[1])
        return hidden_of((module or self.module)(hidden_BTH, *arguments, **keywords))

    @cached_property
    def input_groups(self) -> list[list[str]]:
        """Names of linears that read the same tensor (q, k and v of most models), in order of execution."""
        seen: list[tuple[Tensor, list[str]]] = []  # the tensors are kept, so that no address is used twice
        with self.watch_inputs(lambda name, x: _join_group(seen, name, x)), torch.no_grad():
            self.run(self._probe())
        missing = self.linears.keys() - {name for _, names in seen for name in names}
        if missing:
            raise UsageError(
                f"{sorted(missing)[0]} is not used by its block, so nothing can be learned about it"
            )
        return [names for _, names in seen]

    @contextmanager
    def watch_inputs(self, seen: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Calls `seen(name, input)` for every linear that runs within the context."""
        with ExitStack() as stack:
            for name, linear in self.linears.items():
                hook = _input_hook(name, seen)
                handle = linear.module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    @cached_property
    def halves(self) -> Halves:
        return find_halves(self)

    def _probe(self) -> Tensor:
        parameter = next(self.module.parameters())
        generator = torch.Generator().manual_seed(0)
        noise_BTH = torch.randn(1, 8, self.hidden_size, generator=generator)
        return noise_BTH.to(parameter.device, parameter.dtype)


def _join_group(seen: list[tuple[Tensor, list[str]]], name: str, x: Tensor) -> None:
    for tensor, names in seen:
        if tensor is x or (tensor.data_ptr() == x.data_ptr() and tensor.shape == x.shape):
            names.append(name)
            return
    seen.append((x, [name]))


def _input_hook(name: str, seen: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen(name, arguments[0] if arguments else keywords["input"])

    return hook


@dataclass(frozen=True)
class Halves:
    """The two subblocks, each with its norm and residual: x + attention(norm x) and x + mlp(norm x).

    Both are the block's own forward with the other half's branch giving zeros, and share its parameters.
    parallel: both read the block's input and their branches are added; else the MLP reads the attention half's output.
    """

    attention: nn.Module
    mlp: nn.Module
    parallel: bool


@dataclass(frozen=True)
class _Child:
    name: str
    module: nn.Module
    input: Tensor
    output: Any


def find_halves(block: Block) -> Halves:
    """Tells attention from MLP by what they do: only attention lets one token's output depend on another's input."""
    probe_BTH = block._probe()
    other_BTH = probe_BTH.clone()
    other_BTH[:, 0] += 1.0
    first, second = _trace_children(block, probe_BTH), _trace_children(block, other_BTH)
    mixing = [a.name for a, b in zip(first, second, strict=True) if _mixes_tokens(a, b)]
    branches = [child for child in first if _linears(child.module) or _is_linear(child.module)]
    rest = [child for child in branches if child.name not in mixing]
    attention = [child for child in branches if child.name in mixing]
    if len(attention) != 1 or not rest:
        raise UsageError(
            f"{block.prefix} has no attention and MLP that could be reconstructed apart",
            allowed="granularity matrix or block",
        )
    return _checked_halves(
        block, _silenced(block.module, rest), _silenced(block.module, attention), probe_BTH
    )


def _checked_halves(block: Block, attention: nn.Module, mlp: nn.Module, x_BTH: Tensor) -> Halves:
    """The halves, once one after the other or side by side they have given the block's own output."""
    with torch.no_grad():
        whole_BTH, middle_BTH = block.run(x_BTH), block.run(x_BTH, attention)
        sequential = _distance(block.run(middle_BTH, mlp), whole_BTH)
        parallel = _distance(middle_BTH + block.run(x_BTH, mlp) - x_BTH, whole_BTH)
    if min(sequential, parallel) > 0.05 * _distance(
        x_BTH, whole_BTH
    ):  # rounding of bfloat16 stays well below
        raise UsageError(
            f"{block.prefix} is no sum of an attention and an MLP branch, so they cannot be reconstructed apart",
            allowed="granularity matrix or block",
        )
    return Halves(attention, mlp, parallel=parallel < sequential)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm())


def _trace_children(block: Block, hidden_BTH: Tensor) -> list[_Child]:
    """The direct children that run, in order, with the hidden states that they took and what they gave."""
    calls: list[_Child] = []
    with ExitStack() as stack, torch.no_grad():
        for name, child in block.module.named_children():

            def hook(
                module: nn.Module,
                arguments: tuple[Any, ...],
                keywords: dict[str, Any],
                output: Any,
                name: str = name,
            ) -> None:
                taken = arguments[0] if arguments else keywords.get("hidden_states")
                if isinstance(taken, Tensor):  # cloned, because some blocks add to a branch's output in place
                    calls.append(_Child(name, module, taken.clone(), _cloned(output)))

            handle = child.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        block.run(hidden_BTH)
    return calls


def _cloned(output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0].clone(), *output[1:])
    return output.clone()


def _mixes_tokens(a: _Child, b: _Child) -> bool:
    """Same input at the last token in both runs, another output there: the child looked at other tokens."""
    same_input = torch.equal(_last_token(a.input), _last_token(b.input))
    return same_input and not torch.equal(_last_token(hidden_of(a.output)), _last_token(hidden_of(b.output)))


def _last_token(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])[-1]


class _Zeros(nn.Module):
    """Stands in for a branch: zeros of the branch's width, packed like its output."""

    def __init__(self, width: int, tuple_size: int) -> None:
        super().__init__()
        self.width, self.tuple_size = width, tuple_size

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        x: Tensor = arguments[0] if arguments else keywords["hidden_states"]
        zeros = x.new_zeros(*x.shape[:-1], self.width)
        return (zeros, *[None] * (self.tuple_size - 1)) if self.tuple_size else zeros


def _silenced(block: nn.Module, children: list[_Child]) -> nn.Module:
    """The block with the branch made of `children` giving zeros; everything else is shared with the block."""
    half = copy.copy(block)
    half._modules = dict(block._modules)
    for child in children[:-1]:
        half._modules[child.name] = nn.Identity()
    last = children[-1]
    size = len(last.output) if isinstance(last.output, tuple) else 0
    half._modules[last.name] = _Zeros(hidden_of(last.output).shape[-1], size)
    return half
