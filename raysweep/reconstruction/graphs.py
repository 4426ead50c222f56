"""Steps on a GPU recorded once and replayed, and the streams that they and their samples take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def stream_of(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """One stream a purpose for the whole process. Memory that was freed on a stream is taken again only there, and
    torch hands out its streams in turn: new ones would meet others' sooner or later."""
    return torch.cuda.Stream(device)


@contextmanager
def sending(device: torch.device, purpose: str) -> Iterator[torch.cuda.Event]:
    """Copies that are asked for within the context run on the stream of that purpose, beside what the device is given
    to do from here on. Yields the event that they have arrived."""
    beside, arrived = stream_of(device, purpose), torch.cuda.Event()
    beside.wait_stream(torch.cuda.current_stream(device))  # whose memory this may have been
    with torch.cuda.stream(beside):
        yield arrived
        arrived.record(beside)


@contextmanager
def beside_the_default_stream(device: torch.device) -> Iterator[None]:
    """The stream that graphs are recorded on: behind what is on the default one, which then waits for what is here."""
    if device.type == "cpu":
        yield
        return
    default, side = torch.cuda.current_stream(device), stream_of(device, "graphs")
    side.wait_stream(default)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        default.wait_stream(side)


class StepGraph:
    """A step recorded with its samples in a place of their own, and replayed on others. Raises RuntimeError when the
    step cannot be recorded; then nothing of it was run, and other steps can be recorded."""

    _pool: Any = None  # of memory that all graphs share
    _last: torch.cuda.CUDAGraph | None = None  # alive until another is recorded, and with it the pool

    def __init__(self, step: Callable[..., None], given: Sequence[Tensor]) -> None:
        _make_room(given[0].device)
        self._given = [tensor.clone() for tensor in given]
        self._graph = torch.cuda.CUDAGraph()
        StepGraph._pool = StepGraph._pool or torch.cuda.graph_pool_handle()
        self._graph.capture_begin(pool=StepGraph._pool, capture_error_mode="thread_local")
        try:
            step(*self._given)
        except BaseException:
            self._give_up(given[0].device)
            raise
        self._graph.capture_end()
        StepGraph._last = self._graph

    def replay(self, given: Sequence[Tensor]) -> None:
        """A step on other samples of the same shapes."""
        for mine, each in zip(self._given, given, strict=True):
            mine.copy_(each)
        self._graph.replay()

    def _give_up(self, device: torch.device) -> None:
        """Ends a recording that failed, which torch leaves open, so that others can begin."""
        with suppress(RuntimeError):
            self._graph.capture_end()
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index or 0, StepGraph._pool)
        StepGraph._pool = StepGraph._last = None


def _make_room(device: torch.device) -> None:
    """While a step is recorded, torch gives back no memory that it merely keeps; so before, where little is free."""
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if free < kept:
        torch.cuda.empty_cache()
