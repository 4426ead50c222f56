"""Blocks compiled once in a process for every structure and shape, and run with the tensors of any block."""

# B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raysweep.model.halves import hidden_of
from raysweep.model.structure import Block

Forward = Callable[..., Tensor]
MOST_VARIANTS = 256  # structures times shapes times what is trained; torch stops at 8 and goes slow
_TEMPLATES: dict[Hashable, list[nn.Module]] = {}  # by structure
_CHOSEN: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # the template of a module


def run_compiled(
    block: Block, hidden_BTH: Tensor, module: nn.Module, instead: Mapping[str, Tensor] | None
) -> Tensor:
    """As `Block.run`, compiled. Blocks of one structure share a program, since only tensors tell them apart."""
    other = instead or {}
    own = _tensors_of(module)
    tensors = {name: other.get(f"{block.prefix}.{name}", tensor) for name, tensor in own.items()}
    samples, tokens, _ = hidden_BTH.shape
    arguments, keywords = block.arguments(samples, tokens)
    return _forward_of(_template_of(block, module))(tensors, hidden_BTH, tuple(arguments), dict(keywords))


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled for every shape that it meets."""
    return torch.compile(function, dynamic=False)


def is_of_compiler(error: Exception) -> bool:
    """Whether torch could not compile. Its compiler takes two seconds to import, which those that never train save."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return isinstance(error, TorchDynamoException | InductorError)


@contextmanager
def many_variants() -> Iterator[None]:
    """Within the context functions may be compiled for many structures and shapes."""
    limits = {"recompile_limit": MOST_VARIANTS, "accumulated_recompile_limit": MOST_VARIANTS}
    with torch._dynamo.config.patch(limits):
        yield


@cache
def _forward_of(template: nn.Module) -> Forward:
    def forward(
        tensors: Mapping[str, Tensor],
        hidden_BTH: Tensor,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> Tensor:
        return hidden_of(functional_call(template, dict(tensors), (hidden_BTH, *arguments), keywords))

    return compiled(forward)


def _template_of(block: Block, module: nn.Module) -> nn.Module:
    """A module without storage that computes what `module` computes of its tensors: the first of its structure, if the
    two agree on a probe, so that nothing that lies outside of tensors tells them apart."""
    if module not in _CHOSEN:
        known = _TEMPLATES.setdefault(_structure(module), [])
        found = next((template for template in known if _agree(block, module, template)), None)
        if found is None:
            found = _without_storage(module)
            known.append(found)
        _CHOSEN[module] = found
    return _CHOSEN[module]


@torch.no_grad()
def _agree(block: Block, module: nn.Module, template: nn.Module) -> bool:
    probe_BTH = block.probe()
    samples, tokens, _ = probe_BTH.shape
    arguments, keywords = block.arguments(samples, tokens)
    output = hidden_of(
        functional_call(template, _tensors_of(module), (probe_BTH, *arguments), dict(keywords))
    )
    return torch.equal(output, block.run(probe_BTH, module))


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _structure(module: nn.Module) -> Hashable:
    """Equal for modules of the same parts and settings, with tensors of the same names, shapes and dtypes."""
    return tuple(
        (
            name,
            type(part),
            tuple(sorted((key, repr(value)) for key, value in vars(part).items() if _is_setting(key, value))),
            tuple(
                (leaf, tuple(tensor.shape), tensor.dtype, tensor.device)
                for leaf, tensor in (
                    *part.named_parameters(recurse=False),
                    *part.named_buffers(recurse=False),
                )
            ),
        )
        for name, part in module.named_modules()
    )


def _is_setting(key: str, value: object) -> bool:
    """A plain attribute, but for a block's place in the model, which is no setting unless a probe shows that it is."""
    return key != "layer_idx" and isinstance(value, bool | int | float | str | tuple | type(None))


def _without_storage(module: nn.Module) -> nn.Module:
    ghosts: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for parameter in module.parameters()
    }
    ghosts |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    return copy.deepcopy(module, memo=ghosts)
