"""Whether a checkpoint holds what its configuration says: seen from headers, before a model is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raysweep.errors import UsageError
from raysweep.model.loading import CONFIG, Checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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
        size = getattr(text, name, None)
        if isinstance(size, int | float) and size > most:
            raise UsageError(
                f"{CONFIG} of model {checkpoint.source.path!r} says {name}: {str(size)[:40]}",
                allowed=f"at most {most}, for which its weights have room",
                remedy="Take configuration and weights from the same model.",
            )


def check_tensors(model: PreTrainedModel, names: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Refuses tensors of other shapes than the model's, and integers in place of its weights. Raises UsageError.

    names: own name to name in the checkpoint. Files that are still to be downloaded are checked as they are read.
    """
    if not checkpoint.source.is_local:
        return
    headers = checkpoint.headers()
    for own, tensor in model.state_dict(keep_vars=True).items():
        if names[own] not in headers:
            raise UsageError(
                f"model {checkpoint.source.path!r}: {checkpoint.files[names[own]]} has no tensor {names[own]!r}"
            )
        shape, dtype = headers[names[own]]
        if shape != tuple(tensor.shape):
            raise UsageError(
                f"model {checkpoint.source.path!r}: {names[own]} has shape {shape}, and {CONFIG} asks for "
                f"{tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() and dtype not in REAL_DTYPES:
            raise UsageError(
                f"model {checkpoint.source.path!r}: {names[own]} holds numbers of type {dtype}",
                allowed=", ".join(REAL_DTYPES),
                remedy="Save the model without quantization.",
            )
