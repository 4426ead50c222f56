"""Where tensors wait until they are in hand: on the device, in host memory, or in files."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from raysweep.errors import StorageError, first_line
from raysweep.reconstruction.placement import DEVICE, DISK, HOST

HUGE_BYTES = 8 << 20  # from here on storage of its own is asked of the system, and page-locked beside a GPU


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
        if nbytes < HUGE_BYTES or self.device.type == "cpu":
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.device.type == "cuda")
        return _page_locked(nbytes).view(dtype).view(tuple(shape))

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor there: itself where it lies there already, else a copy."""
        if self.is_on_device:
            return tensor.to(self.device)
        if tensor.device.type == "cpu" and self.kind == HOST:
            return tensor
        if (
            self.kind == HOST
        ):  # many of the same few sizes come and go: the allocator keeps what it has page-locked
            room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return room.copy_(tensor)
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


def _in_file(nbytes: int, folder: Path | None) -> Tensor:
    """Bytes that lie in a file without a name: it ends with its last mapping. The disk gives its room at once, because
    a page that cannot be written later would end the process."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            mapped = mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise StorageError(
            f"{nbytes:,} bytes of activations or weights find no room in {folder or tempfile.gettempdir()}: "
            f"{first_line(error)}.\n  Free some, or name another folder by execution.scratch."
        ) from error
    return torch.frombuffer(mapped, dtype=torch.uint8)


class _Locked(mmap.mmap):
    """Host memory that the device copies from and to by itself; given back with its last tensor."""

    address: int | None = None

    def __del__(self) -> None:
        if self.address is not None:
            torch.cuda.cudart().cudaHostUnregister(self.address)


def _page_locked(nbytes: int) -> Tensor:
    """Bytes of host memory, page-locked where the system allows it.

    torch's own allocator of such memory rounds up to a power of two, which here could be half of the machine's.
    """
    mapped = _Locked(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_HUGEPAGE)  # fewer, larger pages: they are all touched when they are locked
    room = torch.frombuffer(mapped, dtype=torch.uint8)
    if int(torch.cuda.cudart().cudaHostRegister(room.data_ptr(), nbytes, 0)) == 0:
        mapped.address = room.data_ptr()
    return room
