"""The most memory that a process has held, and the thread that looks at it."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable

import torch

from raysweep.shards.peaks import LOOK_EVERY_S, HostPeak, memory_in_use


def lookers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "memory"}


def comes_true(said: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not said() and time.monotonic() < deadline:
        time.sleep(0.01)
    return said()


def test_what_was_held_for_a_while_is_known_afterwards():
    peak, nbytes = HostPeak(), 256 << 20
    before = memory_in_use()
    held = torch.ones(nbytes, dtype=torch.uint8)
    time.sleep(4 * LOOK_EVERY_S)
    del held
    assert comes_true(lambda: memory_in_use() < before + nbytes // 2)
    assert peak.bytes >= before + 0.9 * nbytes
    peak.close()


def test_nobody_looks_any_more_once_it_is_closed_or_forgotten():
    others = lookers()
    peak = HostPeak()
    (thread,) = lookers() - others
    peak.close()
    assert comes_true(lambda: not thread.is_alive())
    assert peak.bytes > 0
    peak = HostPeak()
    (thread,) = lookers() - others
    del peak
    gc.collect()
    assert comes_true(lambda: not thread.is_alive())
