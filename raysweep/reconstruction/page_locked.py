"""Host memory that a GPU copies from and to by itself, at the speed of its link.

torch's own allocator of such memory rounds sizes up to a power of two, which of large tensors can be half of the
machine's memory, and touches their pages one after another.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

KEPT_BYTES = 8 << 30  # of memory that was given back and waits to be asked for again
TOUCH_BYTES = 64 << 20  # that one thread touches at a time
TOUCHING_THREADS = 8


class _Pool:
    """Pieces of memory by size. Locking a page takes longer than filling it, so that pieces are used again."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)
        self._free_bytes = 0
        self._lock = threading.Lock()  # the collector gives memory back in whichever thread it runs
        self._threads: ThreadPoolExecutor | None = None

    def take(self, nbytes: int) -> Tensor:
        """Bytes whose memory comes back with the last tensor that lies in them."""
        with self._lock:
            mapped = self._free[nbytes].pop() if self._free[nbytes] else None
            self._free_bytes -= nbytes if mapped is not None else 0
        mapped = mapped or self._locked(nbytes)
        loan = (ctypes.c_char * nbytes).from_buffer(mapped)
        weakref.finalize(loan, self._give_back, mapped, nbytes)
        return torch.frombuffer(loan, dtype=torch.uint8)

    def _locked(self, nbytes: int) -> mmap.mmap:
        mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapped.madvise(mmap.MADV_HUGEPAGE)
        address = _address(mapped)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(min(TOUCHING_THREADS, os.cpu_count() or 1), "touch")
        starts = range(0, nbytes, TOUCH_BYTES)
        list(
            self._threads.map(lambda start: _touch(address + start, min(TOUCH_BYTES, nbytes - start)), starts)
        )
        torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)  # refused: it is slower, and works
        return mapped

    def _give_back(self, mapped: mmap.mmap, nbytes: int) -> None:
        with self._lock:
            stays = self._free_bytes + nbytes <= KEPT_BYTES
            if stays:
                self._free[nbytes].append(mapped)
                self._free_bytes += nbytes
        if not stays:
            torch.cuda.cudart().cudaHostUnregister(_address(mapped))


def _address(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def _touch(address: int, nbytes: int) -> None:
    ctypes.memset(address, 0, nbytes)


_pool = _Pool()


def page_locked(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor with whatever its memory held before."""
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    return _pool.take(nbytes).view(dtype).view(tuple(shape))
