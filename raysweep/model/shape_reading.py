"""Reads the shape of a model, and checks that it can be pruned: it is built without weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raysweep.errors import UsageError
from raysweep.model.checking import check_plain, check_sizes, check_tensors, check_twins, unused_tensors
from raysweep.model.checkpoint import CONFIG, Checkpoint, ModelSource
from raysweep.model.frame import survey
from raysweep.model.linears import block_linears, find_blocks, routed_in
from raysweep.model.loading import build_skeleton, layout_of, resolve_dtype
from raysweep.model.shape import BlockShape, ModelShape, warn_of_unused


def read_shape(source: ModelSource, dtype: str = "auto") -> ModelShape:
    """The shape of a model from its configuration, after checking that its checkpoint has every tensor.

    Raises UsageError for a model that is not there, has no safetensors, has no blocks that can be pruned, or none that
    can be run one by one.
    """
    config, checkpoint = source.load_config(), Checkpoint.open(source)
    check_plain(config, source)
    check_sizes(config, checkpoint)
    model = build_skeleton(source, config, torch.float32)
    name, modules = find_blocks(model)
    text_config: Any = config.get_text_config()
    blocks = tuple(
        _block_shape(module, f"{name}.{index}", text_config) for index, module in enumerate(modules)
    )
    survey(model)
    layout = layout_of(model, checkpoint)
    check_tensors(model, layout, checkpoint)
    check_twins(model, layout, checkpoint)
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and (type(positions) is not int or positions < 1):
        raise UsageError(
            f"{CONFIG} of model {source.path!r} says max_position_embeddings: {str(positions)[:40]!r}",
            allowed="a whole number from 1, or null",
        )
    embedding = model.get_input_embeddings()
    dtypes = [resolve_dtype(dtype, config, torch.device(device)) for device in ("cpu", "cuda")]
    shape = ModelShape(
        blocks=blocks,
        hidden=text_config.hidden_size,
        vocabulary=text_config.vocab_size,
        vocabulary_parameters=sum(parameter.numel() for parameter in embedding.parameters()),
        max_positions=positions,
        dtype_on_cpu=str(dtypes[0]).removeprefix("torch."),
        dtype_on_device=str(dtypes[1]).removeprefix("torch."),
        attention=_attention_width(text_config),
        unused=tuple(unused_tensors(model, layout, checkpoint)),
    )
    warn_of_unused(shape, source)
    return shape


def _attention_width(config: Any) -> int:
    heads = getattr(config, "num_attention_heads", None)
    if type(heads) is not int or heads < 1:
        return 0
    head = getattr(config, "head_dim", None)
    return heads * head if type(head) is int else int(config.hidden_size)


def _block_shape(module: nn.Module, prefix: str, config: Any) -> BlockShape:
    found = block_linears(module, prefix)
    linears = {name: (linear.weight_OI.shape[0], linear.weight_OI.shape[1]) for name, linear in found.items()}
    transposed = frozenset(name for name, linear in found.items() if linear.transposed)
    chosen = getattr(config, "num_experts_per_tok", None)
    routed = {
        f"{prefix}.{name}": min(1.0, chosen / count) if isinstance(chosen, int) and chosen > 0 else 1.0
        for name, count in routed_in(module).items()
    }
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return BlockShape(linears, parameters, transposed, routed)
