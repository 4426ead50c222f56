"""The skeleton of a Hugging Face model without weights, and its tensors read into it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from raysweep.errors import UsageError, first_line
from raysweep.model.checkpoint import Checkpoint, ModelSource
from raysweep.model.conversions import find_layout
from raysweep.model.experts import separate_experts
from raysweep.model.layout import Layout, Part
from raysweep.model.linears import ALLOWED_MODELS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(wanted: str, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations: `auto` is float32 on a CPU, the checkpoint's own on a device."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cpu":
        return torch.float32
    own = getattr(config, "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.bfloat16


def build_skeleton(source: ModelSource, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights: parameters without storage (on `meta`), buffers real, experts apart. In evaluation
    mode."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),  # whose dtype it overwrites
                dtype=dtype,
                trust_remote_code=source.trust_remote_code,
            )
    except (
        Exception
    ) as error:  # settings that contradict each other end in whatever the arithmetic meets first
        raise UsageError(
            f"model {source.path!r} is no causal language model: {first_line(error)}", allowed=ALLOWED_MODELS
        ) from error
    model.eval()
    separate_experts(model)
    return model


def materialize(
    module: nn.Module, layout: Mapping[str, Sequence[Part]], checkpoint: Checkpoint, device: torch.device
) -> None:
    """Gives the tensors of `module` named in `layout` their values on `device`, each in storage of its own."""
    for name, value in _read(module, layout, checkpoint, device):
        owner, leaf = _place(module, name)
        is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def read_tensors(
    module: nn.Module, layout: Mapping[str, Sequence[Part]], checkpoint: Checkpoint
) -> dict[str, Tensor]:
    """The values of the tensors of `module` named in `layout`, on the CPU; the module stays as it is."""
    return dict(_read(module, layout, checkpoint, torch.device("cpu")))


def _read(
    module: nn.Module, layout: Mapping[str, Sequence[Part]], checkpoint: Checkpoint, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """In the module's dtypes. Every tensor has storage of its own, aligned as the allocator aligns it: arithmetic must
    not depend on where in a file it lay. What is wanted under two names is read once."""
    wanted: dict[tuple[Part, ...], list[str]] = {}
    for own, parts in layout.items():
        wanted.setdefault(tuple(parts), []).append(own)
    for parts, tensor in checkpoint.read(wanted):
        for name in wanted[tuple(parts)]:
            owner, leaf = _place(module, name)
            old = getattr(owner, leaf)
            if tuple(old.shape) != tuple(tensor.shape):
                raise UsageError(
                    f"{name} has shape {tuple(tensor.shape)} in the checkpoint, not {tuple(old.shape)} "
                    f"({checkpoint.files[parts[0].stored]})"
                )
            yield name, torch.empty(old.shape, dtype=old.dtype, device=device).copy_(tensor)


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a tensor, and the tensor's name there."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def layout_of(model: PreTrainedModel, checkpoint: Checkpoint) -> Layout:
    """For every parameter and persistent buffer of `model` what it is made of in the checkpoint.

    Older spellings are translated by transformers' own table, with or without the base model's prefix; tied
    tensors are made of the same. Raises UsageError when a tensor is nowhere to be found.
    """
    return find_layout(model, checkpoint.files, checkpoint.source.path)
