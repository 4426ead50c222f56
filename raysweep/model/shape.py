"""The sizes of a model, for checks and the memory model, and its identity."""

# O outputs, I inputs of a linear

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from raysweep.errors import UsageError
from raysweep.model.checkpoint import CONFIG, Checkpoint, ModelSource

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


def warn_of_unused(shape: ModelShape, source: ModelSource) -> None:
    if shape.unused:
        more = f", and {len(shape.unused) - FEW} more" if len(shape.unused) > FEW else ""
        named = ", ".join(shape.unused[:FEW])
        log.warning("model %r has tensors that it does not use: %s%s", source.path, named, more)


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
