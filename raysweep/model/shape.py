"""The sizes and the identity of a model, read without loading it: for checks and the memory model."""

# O outputs, I inputs of a linear

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raysweep.errors import UsageError
from raysweep.model.checking import check_plain, check_sizes, check_tensors, check_twins, unused_tensors
from raysweep.model.frame import survey
from raysweep.model.linears import block_linears, find_blocks, routed_in
from raysweep.model.loading import (
    CONFIG,
    Checkpoint,
    ModelSource,
    build_skeleton,
    layout_of,
    resolve_dtype,
)

SHARING = (
    ("q", "k", "v", "query", "key", "value"),
    ("gate", "up"),
    ("w1", "w3"),
)  # linears that share an input
FEW = 5  # names in a message
NOT_CONTENT = ("_name_or_path", "transformers_version")  # of config.json: who wrote it, and where

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockShape:
    """linears: (O, I) by full name;  parameters: of the whole block, norms and biases included
    transposed: names of linears that are stored as (I, O)
    routed: of linears of experts, which share of the tokens they see if all experts see as many
    """

    linears: dict[str, tuple[int, int]]
    parameters: int
    transposed: frozenset[str] = frozenset()
    routed: dict[str, float] = field(default_factory=dict)

    def share(self, name: str) -> float:
        """Of the tokens that a linear sees."""
        return self.routed.get(name, 1.0)

    @property
    def input_groups(self) -> list[list[str]]:
        """Linears that read the same tensor, taken from their names: another family's may come out apart."""
        groups: dict[object, list[str]] = {}
        for name in self.linears:
            parent, _, last = name.rpartition(".")
            word = last.removesuffix("_proj").removesuffix("_lin")
            alias = next((number for number, words in enumerate(SHARING) if word in words), None)
            groups.setdefault(name if alias is None else (parent, alias), []).append(name)
        return list(groups.values())

    @property
    def grams(self) -> list[tuple[int, float]]:
        """Inputs of every Gram matrix, and the share of tokens that it sees."""
        return [(self.linears[names[0]][1], self.share(names[0])) for names in self.input_groups]


@dataclass(frozen=True)
class ModelShape:
    """Sizes in numbers, not bytes.

    vocabulary_parameters: of the input embedding (the head has as many);  max_positions: None where unlimited
    attention: width of the queries of all heads together, 0 where the configuration does not say
    unused: stored tensors that the model does not use
    """

    blocks: tuple[BlockShape, ...]
    hidden: int
    vocabulary: int
    vocabulary_parameters: int
    max_positions: int | None
    dtype_on_cpu: str
    dtype_on_device: str
    attention: int = 0
    unused: tuple[str, ...] = ()

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(O, I) of every linear of the blocks."""
        return {name: shape for block in self.blocks for name, shape in block.linears.items()}

    @property
    def routed(self) -> frozenset[str]:
        """Linears of experts."""
        return frozenset(name for block in self.blocks for name in block.routed)

    @property
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every linear's weight as the model keeps it."""
        transposed = {name for block in self.blocks for name in block.transposed}
        return {name: shape[::-1] if name in transposed else shape for name, shape in self.linears.items()}

    @property
    def parameters(self) -> int:
        return sum(block.parameters for block in self.blocks) + self.vocabulary_parameters


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


def warn_of_unused(shape: ModelShape, source: ModelSource) -> None:
    if shape.unused:
        more = f", and {len(shape.unused) - FEW} more" if len(shape.unused) > FEW else ""
        named = ", ".join(shape.unused[:FEW])
        log.warning("model %r has tensors that it does not use: %s%s", source.path, named, more)


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


def model_hash(source: ModelSource) -> str:
    """16 hexadecimal digits that stand for the model's configuration, weights and code, whatever its path.

    SHA-256 over what config.json says, over every weight file, and over the code that comes with the model where it
    is trusted.
    """
    checkpoint = Checkpoint.open(source)
    digest = hashlib.sha256(_config_content(source, checkpoint).encode())
    for file_name in [*checkpoint.file_names(), *_code_files(source, checkpoint)]:
        digest.update(f"{file_name}:{_file_hash(Path(checkpoint.path_of(file_name)))}".encode())
    return digest.hexdigest()[:16]


def _config_content(source: ModelSource, checkpoint: Checkpoint) -> str:
    """The file's own fields, not the defaults of the library, which change with its versions."""
    try:
        fields = dict(json.loads(Path(checkpoint.path_of(CONFIG)).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{CONFIG} of model {source.path!r} is damaged: {error}") from error
    return json.dumps({name: fields[name] for name in fields if name not in NOT_CONTENT}, sort_keys=True)


def _code_files(source: ModelSource, checkpoint: Checkpoint) -> list[str]:
    """Names of the Python files beside config.json, where they may run: transformers has fetched those it needs."""
    if not source.trust_remote_code:
        return []
    return sorted(path.name for path in Path(checkpoint.path_of(CONFIG)).parent.glob("*.py"))


def _file_hash(path: Path) -> str:
    """SHA-256 of a file; one in the Hugging Face cache is stored under it, so that it need not be read."""
    stored = path.resolve()
    if stored.parent.name == "blobs" and len(stored.name) == 64:
        return stored.name
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
