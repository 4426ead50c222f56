"""Tensors on storage: weights by block, which shards and trainers exchange, and recovered units."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysweep.errors import RaysweepError, first_line
from raysweep.results.folders import block_file
from raysweep.results.writer import write_atomically

ABOUT, CHECKSUM = "about", "crc32"  # keys of a file's metadata


def write_block(
    folder: Path, block: int | str, tensors: Mapping[str, Tensor], survives_crashes: bool = True
) -> None:
    """Writes the tensors of a block by full name; the file is there as a whole or not at all."""
    write_tensors(block_file(folder, block), tensors, survives_crashes=survives_crashes)


def read_block(folder: Path, block: int | str) -> dict[str, Tensor]:
    """What `write_block` wrote. Raises RaysweepError when it cannot be read."""
    return read_tensors(block_file(folder, block))[0]


def write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any] | None = None,
    survives_crashes: bool = True,
) -> None:
    """Writes tensors by name, and with them what JSON can hold `about` them; as a whole or not at all.

    survives_crashes: as of `write_atomically`; what a crash has damaged `read_tensors` refuses
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    own = _each_alone(tensors)
    said = json.dumps(dict(about or {}), allow_nan=False)
    checksum = _checksum(own, said)

    def write(temporary: Path) -> None:  # without a copy: a unit of a large model is a gigabyte
        try:
            save_file(own, temporary, {ABOUT: said, CHECKSUM: checksum})
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_atomically(file, write, survives_crashes)


def _each_alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In host memory, copied where one is part of a larger storage or shares it: that cannot be written."""
    own, taken = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        there = tensor.detach().cpu().contiguous()
        if there.untyped_storage().nbytes() != there.nbytes or there.data_ptr() in taken:
            there = there.clone()
        taken.add(there.data_ptr())
        own[name] = there
    return own


def _checksum(tensors: Mapping[str, Tensor], said: str) -> str:
    """CRC-32 of what is said, and of every tensor's name, type, shape and bytes."""
    checksum = zlib.crc32(said.encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        stored = tensor.flatten().view(torch.uint8).numpy()
        checksum = zlib.crc32(stored, checksum)  # type: ignore[arg-type]  # an array is a buffer
    return f"{checksum:08x}"


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote, each tensor in storage of its own. Raises RaysweepError when it cannot be read, or is
    not what was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            names = list(tensors.keys())
            read = {name: tensors.get_tensor(name) for name in names}
            metadata = tensors.metadata() or {}
        said = metadata.get(ABOUT, "{}")
        own = {name: torch.empty_like(tensor).copy_(tensor) for name, tensor in read.items()}
        if metadata.get(CHECKSUM) != _checksum(own, said):
            raise ValueError("its checksum is another one")
        about: dict[str, Any] = json.loads(said)
    except (OSError, SafetensorError, ValueError) as error:
        raise RaysweepError(f"{file} cannot be read: {first_line(error)}") from error
    return own, about
