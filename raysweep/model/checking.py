"""Whether a checkpoint holds what its configuration says: seen from headers, before a model is built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raysweep.errors import UsageError
from raysweep.model.checkpoint import CONFIG, Checkpoint, ModelSource
from raysweep.model.layout import Layout, Part, shape_of, unused

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Headers = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and type of stored tensors."""

LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_attention_heads")
REAL_DTYPES = ("F64", "F32", "F16", "BF16")


def check_sizes(config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """Refuses a configuration of more blocks, or wider ones, than the checkpoint has tensors for: building such a model
    could take hours, or all memory. Raises UsageError."""
    text: Any = config.get_text_config()
    limits = dict.fromkeys(LAYERS, len(checkpoint.files))
    if checkpoint.source.is_local:
        largest = max((math.prod(shape) for shape, _ in checkpoint.headers().values()), default=0)
        limits |= dict.fromkeys(SIZES, largest)
    for name, most in limits.items():
        size = _setting(text, name)
        if isinstance(size, int | float) and size > most:
            raise UsageError(
                f"{CONFIG} of model {checkpoint.source.path!r} says {name}: {str(size)[:40]}",
                allowed=f"at most {most}, for which its weights have room",
                remedy="Take configuration and weights from the same model.",
            )


def _setting(config: PretrainedConfig, name: str) -> Any:
    """None where the configuration has no such setting, or one for each block."""
    try:
        return getattr(config, name, None)
    except Exception:  # of transformers', about settings that differ between blocks; not an AttributeError
        return None


def unused_tensors(model: PreTrainedModel, layout: Layout, checkpoint: Checkpoint) -> list[str]:
    """Stored tensors that the model does not use, with their files, in words."""
    extra = unused(layout, checkpoint.files, model)
    return [f"{name!r} in {checkpoint.files[name]}" for name in extra]


def check_tensors(model: PreTrainedModel, layout: Layout, checkpoint: Checkpoint) -> None:
    """Refuses tensors of other shapes than the model's, and integers in place of its weights. Raises UsageError.

    Files that are still to be downloaded are checked as they are read.
    """
    if not checkpoint.source.is_local:
        return
    headers = checkpoint.headers()
    shapes = {name: shape for name, (shape, _) in headers.items()}
    for own, tensor in model.state_dict(keep_vars=True).items():
        for part in layout[own]:
            _check_there(part.stored, tensor, headers, checkpoint)
        parts = layout[own]
        found = shape_of(parts, shapes)
        if found != tuple(tensor.shape):
            raise UsageError(
                f"model {checkpoint.source.path!r}: {_named(parts, own)} has shape {found}, and {CONFIG} asks for "
                f"{tuple(tensor.shape)} ({checkpoint.files[parts[0].stored]})"
            )


def _check_there(name: str, tensor: Tensor, headers: Headers, checkpoint: Checkpoint) -> None:
    """A stored tensor that is part of one of the model's."""
    if name not in headers:
        raise UsageError(f"model {checkpoint.source.path!r}: {checkpoint.files[name]} has no tensor {name!r}")
    dtype = headers[name][1]
    if tensor.is_floating_point() and dtype not in REAL_DTYPES:
        raise UsageError(
            f"model {checkpoint.source.path!r}: {name} holds numbers of type {dtype} ({checkpoint.files[name]})",
            allowed=", ".join(REAL_DTYPES),
            remedy="Save the model without quantization.",
        )


def _named(parts: Sequence[Part], own: str) -> str:
    if len(parts) == 1 and parts[0].index is None:
        return parts[0].stored
    stored = " and ".join(part.stored for part in parts)
    return f"what is stored in {stored} for {own}"


def check_twins(model: PreTrainedModel, layout: Layout, checkpoint: Checkpoint) -> None:
    """Refuses two tensors that are one by config.json and hold different numbers. Raises UsageError."""
    if not checkpoint.source.is_local:
        return
    for name, source in model.all_tied_weights_keys.items():
        pair = [layout[each] for each in (name, source) if each in layout]
        if len(pair) < 2 or pair[0] == pair[1]:
            continue
        first, second = (dict(checkpoint.read([parts]))[parts] for parts in pair)
        if not torch.equal(first, second):
            one, other = (f"{parts[0].stored!r} in {checkpoint.files[parts[0].stored]}" for parts in pair)
            raise UsageError(
                f"model {checkpoint.source.path!r}: {one} and {other} hold different numbers, and {CONFIG} says that "
                "they are tied",
                remedy=f"Set tie_word_embeddings to false in {CONFIG}, or save the model again.",
            )


def check_plain(config: PretrainedConfig, source: ModelSource) -> None:
    """Refuses weights that are quantized. Raises UsageError."""
    said = getattr(config, "quantization_config", None)
    if said is None:
        return
    fields = said if isinstance(said, dict) else said.to_dict()
    raise UsageError(
        f"model {source.path!r} is quantized ({fields.get('quant_method', 'unknown method')})",
        allowed="weights in " + ", ".join(REAL_DTYPES),
        remedy="Load it with transformers so that it is dequantized, and save it again.",
    )
