"""Weights by block on storage: what shards write and trainers read, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from raysweep.errors import RaysweepError, first_line
from raysweep.results.writer import write_atomically

OUTSIDE = "outside"  # of the blocks: embedding, last norm, head


def block_file(folder: Path, block: int | str) -> Path:
    """The file with the tensors of a block, or of what lies outside of all."""
    return folder / f"block-{block}.safetensors"


def write_block(folder: Path, block: int | str, tensors: Mapping[str, Tensor]) -> None:
    """Writes the tensors of a block by full name; the file is there as a whole or not at all."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(block_file(folder, block), save(own))


def read_block(folder: Path, block: int | str) -> dict[str, Tensor]:
    """What `write_block` wrote, each tensor in storage of its own. Raises RaysweepError when it cannot be read."""
    from safetensors import SafetensorError, safe_open

    file = block_file(folder, block)
    try:
        with safe_open(str(file), framework="pt") as tensors:
            names = list(tensors.keys())
            read = {name: tensors.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise RaysweepError(f"{file} cannot be read: {first_line(error)}") from error
    return {name: torch.empty_like(tensor).copy_(tensor) for name, tensor in read.items()}
