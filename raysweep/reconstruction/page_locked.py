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
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

KEPT_BYTES = 4 << 30  # of memory that was given back and waits to be asked for again
TOUCH_BYTES = 8 << 20  # that one thread touches at a time: tensors of 32 MiB are worth several
TOUCHING_THREADS = 8
POPULATE_WRITE = 23  # of madvise, from Linux 5.14 on: pages are there, and nothing is written twice
_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class _Pool:
    """Pieces of memory by size. Locking a page takes longer than filling it, so that pieces are used again.

    All together never take more than the most that was in use at once: what plans count.
    """

    def __init__(self) -> None:
        self._free: list[tuple[mmap.mmap, int]] = []  # the longest unused first
        # Memory comes back in whichever thread the collector runs, perhaps one that holds the lock.
        self._returned: deque[tuple[mmap.mmap, int]] = deque()
        self._locked: set[int] = set()  # addresses
        self._in_use = self._most_in_use = 0  # bytes
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def take(self, nbytes: int) -> Tensor:
        """Bytes whose memory comes back with the last tensor that lies in them."""
        with self._lock:
            self._tidy()
            place = next((k for k, (_, size) in enumerate(self._free) if size == nbytes), None)
            in_use = self._in_use + nbytes
            most = max(self._most_in_use, in_use)
            if place is None:
                self._let_go_but(most - in_use)
            mapped = self._new(nbytes) if place is None else self._free.pop(place)[0]
            self._in_use, self._most_in_use = in_use, most
        loan = (ctypes.c_char * nbytes).from_buffer(mapped)
        weakref.finalize(loan, self._returned.append, (mapped, nbytes)).atexit = False
        return torch.frombuffer(loan, dtype=torch.uint8)

    def _tidy(self) -> None:
        """Takes in what came back, and lets go of what is too much."""
        while self._returned:
            self._free.append(self._returned.popleft())
            self._in_use -= self._free[-1][1]
        self._let_go_but(KEPT_BYTES)

    def _let_go_but(self, nbytes: int) -> None:
        """Of what is free, at most so many bytes stay."""
        while sum(size for _, size in self._free) > nbytes:
            mapped, _ = self._free.pop(0)
            if (address := _address(mapped)) in self._locked:
                self._locked.remove(address)
                torch.cuda.cudart().cudaHostUnregister(address)

    def _new(self, nbytes: int) -> mmap.mmap:
        mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapped.madvise(mmap.MADV_HUGEPAGE)
        address = _address(mapped)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(min(TOUCHING_THREADS, os.cpu_count() or 1), "touch")
        starts = range(0, nbytes, TOUCH_BYTES)
        list(
            self._threads.map(lambda start: touch(address + start, min(TOUCH_BYTES, nbytes - start)), starts)
        )
        if int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)) == 0:
            self._locked.add(address)
        else:  # copies from there are slower, and work
            with suppress(RuntimeError):  # the next call would raise what this one was refused for
                torch.zeros(1, device="cuda")
        return mapped


def _address(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def touch(address: int, nbytes: int) -> None:
    """Has the system give the pages of new memory now."""
    if _libc.madvise(address, nbytes, POPULATE_WRITE) != 0:
        ctypes.memset(address, 0, nbytes)


_pool = _Pool()


def page_locked(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor with whatever its memory held before."""
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    return _pool.take(nbytes).view(dtype).view(tuple(shape))
