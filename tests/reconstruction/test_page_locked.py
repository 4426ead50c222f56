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
from raysweep.reconstruction.graphs import stream_of
from raysweep.reconstruction.page_locked import page_locked, touch

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda", 0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def touched_bytes(nbytes: int) -> int:
    """Bytes that come into memory when so many new ones are touched."""
    mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    before = resident_bytes()
    touch(ctypes.addressof(ctypes.c_char.from_buffer(mapped)), nbytes)
    return resident_bytes() - before


def test_pages_are_there_once_they_are_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(ctypes, "memset", lambda *arguments: written.append(arguments[2]))
    there = touched_bytes(64 << 20)
    if written:
        pytest.skip("Linux here is older than 5.14")
    assert there > 0.95 * (64 << 20)


def test_an_older_system_writes_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POPULATE_WRITE", 9999)
    assert touched_bytes(64 << 20) > 0.95 * (64 << 20)


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


class Driver:
    """Counts what is locked, on machines without a GPU as well."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        del self.locked[address]


def test_pieces_of_other_sizes_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """All together never take more than was in use at once."""
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    pool = module._Pool()
    pool.take(3 << 20)
    gc.collect()
    held = [pool.take(2 << 20)]  # 3 MiB were in use at once, so that those that are free go
    assert sorted(driver.locked.values()) == [2 << 20]
    held.append(pool.take(2 << 20))
    held.clear()
    gc.collect()
    one = pool.take(1 << 20)  # 4 MiB were, and one of the two may stay
    assert sorted(driver.locked.values()) == [1 << 20, 2 << 20]
    two = pool.take(2 << 20)
    assert sorted(driver.locked.values()) == [1 << 20, 2 << 20]
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    del one, two
    gc.collect()
    pool.take(1 << 10)
    assert list(driver.locked.values()) == [1 << 10]


@on_a_gpu
@pytest.mark.parametrize("pieces", [[slice(0, 4)], [slice(0, 4), slice(4, 8), slice(8, 9)]], ids=str)
def test_samples_that_are_sent_ahead_are_whole_when_they_arrive(pieces: list[slice]) -> None:
    """Though their copies are late, and the memory that they take was written to a moment ago."""
    stored = page_locked((9, 1024, 1024), torch.float32)
    stored.copy_(torch.rand(9, 1024, 1024))
    expected = stored.to(GPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream_of(GPU, "samples")):
        torch.cuda._sleep(200_000_000)
    before = torch.empty_like(stored[pieces[0]], device=GPU)
    torch.cuda._sleep(400_000_000)
    before.fill_(-1)
    del before
    same = [
        (given == expected[rows]).all()
        for rows, given in zip(pieces, one_ahead(stored, pieces, GPU), strict=True)
    ]
    assert all(map(bool, same))


@on_a_gpu
def test_a_copy_that_nobody_waits_for_disturbs_nobody() -> None:
    stored = page_locked((4, 1024, 1024), torch.float32)
    stored.fill_(7)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream_of(GPU, "samples")):
        torch.cuda._sleep(400_000_000)
    given = one_ahead(stored, [slice(0, 4)], GPU)
    del given
    taken = torch.full_like(stored, 1, device=GPU)  # perhaps where the copy goes
    assert bool((taken == 1).all())
    torch.cuda.synchronize()
    assert bool((taken == 1).all())
