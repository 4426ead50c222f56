"""Masks that come from a file: safetensors with a 0/1 tensor per linear, perhaps with updated weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.config.criterion import FILE_PREFIX
from raysweep.config.paths import typed_path
from raysweep.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_SUFFIX = ".weight"
CONTENT = (
    "safetensors with a uint8 tensor of 0 and 1 per linear, under its name, in the layout of its weight; "
    "updated weights, if any, as <linear>.weight"
)


class MaskFile:
    """A file of masks. Tensors are read one by one, when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError when the file is not there or no safetensors file."""
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(str(self.path), framework="pt") as tensors:
                self.names = frozenset(tensors.keys())
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"masks {str(self.path)!r} cannot be read: {error}", where="criterion", allowed=CONTENT
            ) from error

    @classmethod
    def of(cls, criterion: str) -> MaskFile:
        """The one that `file:PATH` names, by an absolute path, because shards work in other folders."""
        return cls(typed_path(criterion.removeprefix(FILE_PREFIX), "masks").absolute())

    @property
    def content_hash(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the file."""
        with open(self.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses a file that does not fit. shapes: by linear, of its weight as the model stores it. UsageError."""
        linears = {name for name in self.names if name not in {f"{known}{WEIGHT_SUFFIX}" for known in shapes}}
        weights = {name.removesuffix(WEIGHT_SUFFIX) for name in self.names - linears}
        unknown = sorted(linears - shapes.keys() or weights - linears)
        if unknown or not linears:
            what = "holds no mask"
            if linears:
                what = f"holds {unknown[0]!r}, which is no linear of the model, or a weight without its mask"
            raise UsageError(f"masks {str(self.path)!r}: it {what}", where="criterion", allowed=CONTENT)
        for name in sorted(linears):
            for tensor in (self.mask(name), self.weight(name)):
                if tensor is not None and tuple(tensor.shape) != shapes[name]:
                    raise UsageError(
                        f"masks {str(self.path)!r}: {name} has shape {tuple(tensor.shape)}, its weight {shapes[name]}",
                        where="criterion",
                        allowed=CONTENT,
                    )

    def mask(self, name: str) -> Tensor | None:
        """The mask of a linear, bool, True = kept, in the layout of its weight; None where the file has none."""
        if name not in self.names:
            return None
        tensor = self._read(name)
        if not bool(((tensor == 0) | (tensor == 1)).all()):
            raise UsageError(
                f"masks {str(self.path)!r}: {name} holds other numbers than 0 and 1",
                where="criterion",
                allowed=CONTENT,
            )
        return tensor.bool()

    def weight(self, name: str) -> Tensor | None:
        """The updated weight of a linear as it is stored; None where the file has none."""
        return self._read(f"{name}{WEIGHT_SUFFIX}") if f"{name}{WEIGHT_SUFFIX}" in self.names else None

    def _read(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(str(self.path), framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        # Storage of its own: what is read may lie anywhere in the file, and arithmetic must not depend on where.
        return tensor.clone()
