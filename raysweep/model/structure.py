"""One decoder block with its place in the model: how it runs, its linears and their inputs, its halves."""

# B samples, T tokens of a sample, H hidden

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raysweep.errors import UsageError
from raysweep.model.halves import Halves, find_halves, hidden_of
from raysweep.model.linears import block_linears, routed_in

PROBE_TOKENS = 8  # enough for attention to look at another token than its own

BlockArguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""What a block takes besides the hidden states: positional and keyword arguments."""

InHand = Callable[[], AbstractContextManager[Any]]


class Block:
    """One decoder block. Its linears are by full name; its input groups and halves are found on first use.

    routed: linears of experts, which see only the tokens that are routed to them
    `arguments(B, T)` gives what the block takes besides hidden states of shape (B, T, H).
    `in_hand()` is a context within which its dense weights are there, where they may be elsewhere.
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
        self.routed = frozenset(f"{prefix}.{name}" for name in routed_in(module))
        self.arguments = arguments
        self.in_hand: InHand = nullcontext

    @cached_property
    def parameter_names(self) -> list[str]:
        """Full names of its parameters."""
        return [f"{self.prefix}.{name}" for name, _ in self.module.named_parameters()]

    def run(
        self,
        hidden_BTH: Tensor,
        module: nn.Module | None = None,
        instead: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The output hidden states (B, T, H) of the block, or of one of its halves.

        instead: tensors, by full name, that stand in for the block's parameters and through which gradients flow
        """
        samples, tokens, _ = hidden_BTH.shape
        arguments, keywords = self.arguments(samples, tokens)
        module = self.module if module is None else module
        if not instead:
            return hidden_of(module(hidden_BTH, *arguments, **keywords))
        named = ((name, instead.get(f"{self.prefix}.{name}")) for name, _ in module.named_parameters())
        inside = {name: tensor for name, tensor in named if tensor is not None}
        return hidden_of(functional_call(module, inside, (hidden_BTH, *arguments), dict(keywords)))

    @contextmanager
    def watch_inputs(self, seen: Callable[[str, Tensor], None], names: Iterable[str]) -> Iterator[None]:
        """Calls `seen(name, input)` whenever one of the linears `names` runs within the context."""
        with ExitStack() as stack:
            for name in names:
                hook = _input_hook(name, seen)
                handle = self.linears[name].module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    @cached_property
    def input_groups(self) -> list[list[str]]:
        """Names of linears that read the same tensor (q, k and v of most models), in order of execution.

        Behind them, one by one, those of experts that do not run without tokens and got none of the probe.

        Raises UsageError when a linear does not run, so that nothing could be learned about it.
        """
        seen: list[tuple[Tensor, list[str]]] = []  # the tensors are kept, so that no address is used twice
        watch = self.watch_inputs(lambda name, x: _join_group(seen, name, x), self.linears)
        with self.in_hand(), watch, torch.no_grad():
            self.run(self.probe())
        groups = [names for _, names in seen]
        ran = {name for names in groups for name in names}
        idle = [name for name in self.linears if name not in ran]
        unused = [name for name in idle if name not in self.routed]
        if unused or (idle and not ran & self.routed):
            name = min(unused or idle)
            raise UsageError(f"{name} is not used by its block, so nothing can be learned about it")
        return groups + [[name] for name in idle]

    @cached_property
    def leaders(self) -> list[str]:
        """The first linear of every input group, under whose name the group's input is known."""
        return [names[0] for names in self.input_groups]

    def leader_of(self, name: str) -> str:
        """The first linear of the input group of the linear `name`."""
        return next(names[0] for names in self.input_groups if name in names)

    @cached_property
    def halves(self) -> Halves:
        """The attention and the MLP half. Raises UsageError when the block is no sum of the two."""
        with self.in_hand():
            return find_halves(self.module, self.prefix, self.run, self.probe())

    def probe(self) -> Tensor:
        """Hidden states of one sample, noise of a fixed seed, on the block's device and in its dtype."""
        parameter = next(self.module.parameters())
        generator = torch.Generator().manual_seed(0)
        noise_BTH = torch.randn(1, PROBE_TOKENS, self.hidden_size, generator=generator)
        return noise_BTH.to(parameter.device, parameter.dtype)


def _join_group(seen: list[tuple[Tensor, list[str]]], name: str, x: Tensor) -> None:
    for tensor, names in seen:
        same_place = tensor.data_ptr() == x.data_ptr() and x.numel() > 0  # no tokens, no place
        if same_place and tensor.shape == x.shape:
            names.append(name)
            return
    seen.append((x, [name]))


def _input_hook(name: str, seen: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen(name, arguments[0] if arguments else keywords["input"])

    return hook
