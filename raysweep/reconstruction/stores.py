"""Where tensors wait until they are in hand: on the device, in host memory, or in files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from raysweep.errors import StorageError, first_line
from raysweep.reconstruction.page_locked import page_locked
from raysweep.reconstruction.placement import DEVICE, DISK, HOST

LARGE_BYTES = 1 << 20  # from here on host memory beside a GPU is page-locked piece by piece


@dataclass(frozen=True)
class Store:
    """A place for tensors.

    kind: device, host (page-locked beside a GPU, so that copies run at the link's speed), or disk: files, which the
    system reads ahead and writes behind, and which are gone with the tensors, whatever ends the process
    device: that work is done on;  folder: of the files
    """

    kind: str
    device: torch.device
    folder: Path | None = None

    @property
    def is_on_device(self) -> bool:
        """Whether what waits here needs not be copied to be used."""
        return self.kind == DEVICE or (self.kind == HOST and self.device.type == "cpu")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room for a tensor. Raises StorageError where the disk has none."""
        nbytes = prod(shape) * dtype.itemsize
        if self.is_on_device or nbytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        if self.kind == DISK:
            return _in_file(nbytes, self.folder).view(dtype).view(tuple(shape))
        if nbytes >= LARGE_BYTES:
            return page_locked(shape, dtype)
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor there: itself where it lies there already, else a copy."""
        if self.is_on_device:
            return tensor.to(self.device)
        if self.kind == HOST and tensor.device.type == "cpu":
            return tensor
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


def _in_file(nbytes: int, folder: Path | None) -> Tensor:
    """Bytes that lie in a file without a name: it ends with its last mapping. The disk gives its room at once, because
    a page that cannot be written later would end the process."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            # Python's own mapping would hold on to the file, of which a process can open but so many.
            opened = f"/proc/self/fd/{file.fileno()}"
            return torch.from_file(opened, shared=True, size=nbytes, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise StorageError(
            f"{nbytes:,} bytes of activations or weights find no room in {folder or tempfile.gettempdir()}: "
            f"{first_line(error)}.\n  Free some, or name another folder by execution.scratch."
        ) from error
