"""The sizes of a model, read without its weights: for checks before anything starts, and for the memory model."""

# O outputs, I inputs of a linear

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from raysweep.errors import UsageError
from raysweep.model.loading import Checkpoint, ModelSource, build_skeleton, resolve_dtype, tensor_names
from raysweep.model.structure import block_linears, find_blocks


@dataclass(frozen=True)
class BlockShape:
    """linears: (O, I) by full name;  parameters: of the whole block, norms and biases included."""

    linears: dict[str, tuple[int, int]]
    parameters: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes in numbers, not bytes.

    vocabulary_parameters: of the input embedding (the head has as many);  max_positions: None where unlimited
    """

    blocks: tuple[BlockShape, ...]
    hidden: int
    vocabulary: int
    vocabulary_parameters: int
    max_positions: int | None
    dtype_on_cpu: str
    dtype_on_device: str

    @property
    def parameters(self) -> int:
        return sum(block.parameters for block in self.blocks) + self.vocabulary_parameters


def read_shape(source: ModelSource, dtype: str = "auto") -> ModelShape:
    """The shape of a model from its configuration, after checking that its checkpoint has every tensor.

    Raises UsageError for a model that is not there, has no safetensors, or has no blocks that can be pruned.
    """
    import torch

    config, checkpoint = source.load_config(), Checkpoint.open(source)
    model = build_skeleton(source, config, torch.float32)
    tensor_names(model, checkpoint)
    name, modules = find_blocks(model)
    text_config: Any = config.get_text_config()
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    dtypes = [resolve_dtype(dtype, config, torch.device(device)) for device in ("cpu", "cuda")]
    return ModelShape(
        blocks=tuple(_block_shape(module, f"{name}.{index}") for index, module in enumerate(modules)),
        hidden=text_config.hidden_size,
        vocabulary=text_config.vocab_size,
        vocabulary_parameters=sum(parameter.numel() for parameter in embedding.parameters()),
        max_positions=getattr(text_config, "max_position_embeddings", None),
        dtype_on_cpu=str(dtypes[0]).removeprefix("torch."),
        dtype_on_device=str(dtypes[1]).removeprefix("torch."),
    )


def _block_shape(module: nn.Module, prefix: str) -> BlockShape:
    linears = {
        name: (linear.weight_OI.shape[0], linear.weight_OI.shape[1])
        for name, linear in block_linears(module, prefix).items()
    }
    return BlockShape(linears, sum(parameter.numel() for parameter in module.parameters()))


def model_hash(source: ModelSource) -> str:
    """16 hexadecimal digits that stand for the model's configuration and weights, whatever its path.

    SHA-256 over config.json and every weight file. Files of the Hugging Face cache are stored under the SHA-256 of
    their content, which is taken from their name instead of reading them.
    """
    checkpoint = Checkpoint.open(source)
    config = source.load_config()
    digest = hashlib.sha256(config.to_json_string(use_diff=True).encode())
    for file_name in checkpoint.file_names():
        digest.update(f"{file_name}:{_file_hash(Path(checkpoint.path_of(file_name)))}".encode())
    return digest.hexdigest()[:16]


def _file_hash(path: Path) -> str:
    stored_under = path.resolve().name
    if len(stored_under) == 64 and set(stored_under) <= set("0123456789abcdef"):
        return stored_under
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
