"""Page-locked memory beside a GPU."""

from __future__ import annotations

import ctypes
import gc
import mmap
from pathlib import Path

import pytest
import torch

from raysweep.reconstruction import page_locked as module
from raysweep.reconstruction.feed import one_ahead
from raysweep.reconstruction.page_locked import page_locked, touch

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda", 0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("advice", [module.POPULATE_WRITE, 9999], ids=["at once", "on an older system"])
def test_pages_are_there_once_they_are_touched(advice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POPULATE_WRITE", advice)
    nbytes = 64 << 20
    mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    before = resident_bytes()
    touch(ctypes.addressof(ctypes.c_char.from_buffer(mapped)), nbytes)
    assert resident_bytes() - before > 0.95 * nbytes


@on_a_gpu
def test_memory_that_came_back_is_used_again_and_stays_locked() -> None:
    shape = (3, 1_000_003)  # of a size that nothing else asks for
    first = page_locked(shape, torch.uint8)
    assert first.is_pinned()
    address = first.data_ptr()
    del first
    gc.collect()
    again = page_locked(shape, torch.uint8)
    assert again.data_ptr() == address
    assert again.is_pinned()
    assert page_locked(shape, torch.uint8).data_ptr() != address


@on_a_gpu
@pytest.mark.parametrize("pieces", [[slice(0, 4)], [slice(0, 4), slice(4, 8), slice(8, 9)]], ids=str)
def test_samples_that_are_sent_ahead_arrive_in_order(pieces: list[slice]) -> None:
    stored = page_locked((9, 1024, 1024), torch.float32)
    stored.copy_(torch.arange(9.0).view(9, 1, 1).expand(9, 1024, 1024))
    found = []
    for rows, given in zip(pieces, one_ahead(stored, pieces, GPU), strict=True):
        busy = torch.zeros(2048, 2048, device=GPU)
        for _ in range(20):  # memory that is given back meanwhile is taken again by others
            busy = busy @ busy
        assert torch.equal(given.cpu(), stored[rows])
        found.append(len(given))
    assert found == [rows.stop - rows.start for rows in pieces]
