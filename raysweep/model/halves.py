"""The attention and the MLP half of a block, found by what its parts do and checked against the whole."""

# B samples, T tokens of a sample, H hidden

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raysweep.errors import UsageError
from raysweep.model.experts import Experts
from raysweep.model.linears import linears_in, routed_in

RunModule = Callable[[Tensor, nn.Module], Tensor]
"""Runs a block, or one of its halves, on hidden states (B, T, H), with the model's arguments."""

Form = tuple[type[list[Any]] | type[tuple[Any, ...]], int] | None
"""What hidden states come first in, and its size; None where they come alone."""

TOLERANCE = (
    0.05  # of what the block changes; assumption: bfloat16 rounds far less, a wrong split is far worse
)


ROUNDING = (
    0.02  # of a token's output, that which other tokens beside it can make; assumption: bfloat16 makes 0.004
)


@dataclass(frozen=True)
class Halves:
    """The two subblocks, each with its norm and residual: x + attention(norm x) and x + mlp(norm x).

    Both are the block's own forward with the other half's branch giving zeros (where it adds the residual itself, the
    residual), and share its parameters.
    parallel: both read the block's input and their branches are added; else the MLP reads what the attention
    half gives.
    """

    attention: nn.Module
    mlp: nn.Module
    parallel: bool


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a module returned, alone or first in a tuple or list."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def find_halves(block: nn.Module, prefix: str, run: RunModule, probe_BTH: Tensor) -> Halves:
    """Tells attention from MLP: only attention lets one token's output depend on another token's input.

    probe_BTH: hidden states of three tokens or more, all different. Raises UsageError for a block that is no
    sum of an attention and an MLP branch.
    """
    other_BTH = probe_BTH.clone()
    other_BTH[:, -2] = probe_BTH[:, 0]  # close to the last token: some attention has a short window
    first, second = _trace_children(block, run, probe_BTH), _trace_children(block, run, other_BTH)
    mixing = {a.name for a, b in zip(first, second, strict=True) if _mixes_tokens(a, b)}
    branches = [child for child in first if linears_in(child.module)]
    attention = [child for child in branches if child.name in mixing]
    mlp = [child for child in branches if child.name not in mixing]
    if len(attention) != 1 or not mlp:
        raise _inseparable(f"{prefix} has no attention and MLP that could be reconstructed apart")
    halves = _checked(run, block, _silenced(block, mlp), _silenced(block, attention), probe_BTH)
    if halves is None:
        raise _inseparable(f"{prefix} is no sum of attention and MLP, so they cannot be reconstructed apart")
    return halves


def _inseparable(what: str) -> UsageError:
    return UsageError(what, allowed="granularity matrix or block")


def _checked(
    run: RunModule, block: nn.Module, attention: nn.Module, mlp: nn.Module, x_BTH: Tensor
) -> Halves | None:
    """The halves if one after the other, or side by side, they give the block's own output."""
    with torch.no_grad():
        whole_BTH, middle_BTH = run(x_BTH, block), run(x_BTH, attention)
        sequential = _distance(run(middle_BTH, mlp), whole_BTH)
        parallel = _distance(middle_BTH + run(x_BTH, mlp) - x_BTH, whole_BTH)
    if min(sequential, parallel) > TOLERANCE * _distance(x_BTH, whole_BTH):
        return None
    return Halves(attention, mlp, parallel=parallel < sequential)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm())


@dataclass(frozen=True)
class _Child:
    """A direct child of a block that ran: the hidden states that it took, all that it was given, what it returned."""

    name: str
    module: nn.Module
    input: Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any


def _trace_children(block: nn.Module, run: RunModule, hidden_BTH: Tensor) -> list[_Child]:
    """The direct children that run on hidden states, in order."""
    calls: list[_Child] = []
    with ExitStack() as stack, torch.no_grad():
        for name, child in block.named_children():
            handle = child.register_forward_hook(_recorder(calls, name), with_kwargs=True)
            stack.callback(handle.remove)
        run(hidden_BTH, block)
    return calls


def _recorder(calls: list[_Child], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        taken = arguments[0] if arguments else keywords.get("hidden_states")
        if isinstance(taken, Tensor):
            calls.append(_Child(name, module, taken.clone(), arguments, keywords, _cloned(output)))

    return hook


def _cloned(output: Any) -> Any:
    """Cloned, because some blocks add to a branch's output in place."""
    if isinstance(output, list):
        return [output[0].clone(), *output[1:]]
    return (output[0].clone(), *output[1:]) if isinstance(output, tuple) else output.clone()


def _mixes_tokens(a: _Child, b: _Child) -> bool:
    """Same input at the last token in both runs, another output there: the child looked at other tokens.

    An expert that takes more tokens may round the same one otherwise, so there it must be more than that.
    """
    if not torch.equal(_last_token(a.input), _last_token(b.input)):
        return False
    first, second = _last_token(hidden_of(a.output)), _last_token(hidden_of(b.output))
    if routed_in(a.module) or isinstance(a.module, Experts):
        return _distance(first, second) > ROUNDING * float(first.float().norm())
    return not torch.equal(first, second)


def _last_token(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])[-1]


class _Zeros(nn.Module):
    """Stands in for a branch: zeros of the branch's width, packed like its output."""

    def __init__(self, width: int, form: Form) -> None:
        super().__init__()
        self.width, self.form = width, form

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        x: Tensor = arguments[0] if arguments else keywords["hidden_states"]
        return _packed(x.new_zeros(*x.shape[:-1], self.width), self.form)


class _Residual(nn.Module):
    """Stands in for a branch that adds the residual itself: gives the argument at that place, packed like it."""

    def __init__(self, place: int | str, form: Form) -> None:
        super().__init__()
        self.place, self.form = place, form

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        residual = arguments[self.place] if isinstance(self.place, int) else keywords[self.place]
        return _packed(residual, self.form)


def _form(output: Any) -> Form:
    """How a module packs its hidden states."""
    if isinstance(output, list):
        return list, len(output)
    return (tuple, len(output)) if isinstance(output, tuple) else None


def _packed(hidden: Tensor, form: Form) -> Any:
    if form is None:
        return hidden
    kind, size = form
    return kind([hidden, *[None] * (size - 1)])


def _silenced(block: nn.Module, branch: list[_Child]) -> nn.Module:
    """The block with the children of `branch` adding nothing in the end; all else is shared with the block."""
    half = copy.copy(block)
    half._modules = dict(block._modules)
    for child in branch[:-1]:
        half._modules[child.name] = nn.Identity()
    last = branch[-1]
    half._modules[last.name] = _stand_in(last)
    return half


@torch.no_grad()
def _stand_in(child: _Child) -> nn.Module:
    """What gives what the child gives when its linears give zeros."""
    form = _form(child.output)
    hidden = hidden_of(child.output)
    zeros = _Zeros(hidden.shape[-1], form)
    given: dict[int | str, Any] = dict(enumerate(child.arguments))
    given.update(child.keywords)
    places = [
        place for place, value in given.items() if place not in (0, "hidden_states") and _like(value, hidden)
    ]
    if not places:
        return zeros
    silent = {
        f"{name}.{leaf}" if name else leaf: torch.zeros_like(parameter)
        for name, linear in linears_in(child.module).items()
        for leaf, parameter in linear.named_parameters(recurse=False)
    }
    without = hidden_of(functional_call(child.module, silent, child.arguments, child.keywords))
    residual = next((place for place in places if torch.equal(given[place], without)), None)
    return zeros if residual is None else _Residual(residual, form)


def _like(value: Any, hidden: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == hidden.shape and value.dtype == hidden.dtype
