"""Tensors on storage: weights by block, which shards and trainers exchange, and recovered units."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from raysweep.errors import RaysweepError, first_line
from raysweep.results.atomic import write_atomically
from raysweep.results.folders import block_file

ABOUT, CHECKSUM = "about", "crc32"  # keys of a file's metadata
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    said = json.dumps(dict(about or {}), allow_nan=False)
    metadata = {ABOUT: said, CHECKSUM: _checksum(own, said)}
    write_atomically(file, partial(_write, own, metadata), survives_crashes)


def _write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], stream: BinaryIO) -> None:
    """The format of safetensors (its README): the header's length in eight bytes, the header, the tensors' bytes.

    Its own functions copy all tensors, a gigabyte for a unit of a large model, or write a file of another name, which
    nothing cleans up after a crash.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)
    for tensor in tensors.values():
        stream.write(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer


def _checksum(tensors: Mapping[str, Tensor], said: str) -> str:
    """CRC-32 of what is said, and of every tensor's name, type, shape and bytes."""
    checksum = zlib.crc32(said.encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(_bytes_of(tensor), checksum)
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
