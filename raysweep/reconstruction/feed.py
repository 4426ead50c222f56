"""The samples of every step on the device: read ahead by a thread, and copied on a stream of their own."""

# S samples, B samples of a step

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Queue

import torch
from torch import Tensor

from raysweep.reconstruction.activations import batches
from raysweep.reconstruction.graphs import stream_of

AHEAD = 2  # steps whose samples are on their way, or in hand


@dataclass
class _Slot:
    """Room for the samples of one step: where the host puts them, where the device finds them."""

    pinned: list[Tensor]
    device: list[Tensor]
    copied: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    used: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    samples: int = 0


@contextmanager
def in_batches(sources: Sequence[Tensor], device: torch.device) -> Iterator[Iterator[list[Tensor]]]:
    """All samples of the sources in order, in the batches of every forward pass; as `feed` gives steps."""
    samples, tokens = sources[0].shape[:2]
    rows = batches(samples, tokens, device)
    if all(source.device == device for source in sources):
        yield ([source[each] for source in sources] for each in rows)  # views
        return
    with feed(sources, [torch.arange(each.start, each.stop) for each in rows], device) as given:
        yield given


@contextmanager
def feed(
    sources: Sequence[Tensor], steps: Sequence[Tensor], device: torch.device
) -> Iterator[Iterator[list[Tensor]]]:
    """Within the context an iterator over steps: the samples of each source, good until the next one is asked for.

    sources: (S, ...) on the host, or all on the device;  steps: by step, which samples, int64 (B,)
    """
    if all(source.device == device for source in sources):
        order = torch.cat(list(steps)).to(device)
        parts = order.split([len(rows_B) for rows_B in steps])
        yield ([source[rows_B] for source in sources] for rows_B in parts)
        return
    reader = _Reader(sources, steps, device)
    try:
        yield iter(reader)
    finally:
        reader.close()


class _Reader:
    def __init__(self, sources: Sequence[Tensor], steps: Sequence[Tensor], device: torch.device) -> None:
        self._sources, self._steps, self._device = sources, steps, device
        self._free: Queue[_Slot | None] = Queue()
        self._ready: Queue[_Slot | BaseException] = Queue()
        largest = max(map(len, steps), default=0)
        for _ in range(min(AHEAD, len(steps))):
            shapes = [(largest, *source.shape[1:]) for source in sources]
            self._free.put(
                _Slot(
                    [
                        torch.empty(s, dtype=x.dtype, pin_memory=True)
                        for s, x in zip(shapes, sources, strict=True)
                    ],
                    [
                        torch.empty(s, dtype=x.dtype, device=device)
                        for s, x in zip(shapes, sources, strict=True)
                    ],
                )
            )
        self._stream = stream_of(device, "samples")
        self._stream.wait_stream(torch.cuda.current_stream(device))  # whose memory the slots may have been
        self._thread = threading.Thread(target=self._read_all, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[list[Tensor]]:
        for _ in self._steps:
            slot = self._ready.get()
            if isinstance(slot, BaseException):
                raise slot
            torch.cuda.current_stream(self._device).wait_event(slot.copied)
            yield [tensor[: slot.samples] for tensor in slot.device]
            slot.used.record(torch.cuda.current_stream(self._device))
            self._free.put(slot)

    def close(self) -> None:
        """Ends the thread; what it has begun to copy comes before anything that takes the memory."""
        self._free.put(None)
        self._thread.join()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _read_all(self) -> None:
        try:
            for rows_B in self._steps:
                slot = self._free.get()
                if slot is None:
                    return
                self._read(slot, rows_B)
                self._ready.put(slot)
        except BaseException as error:  # the loop that waits for it must hear of it
            self._ready.put(error)

    def _read(self, slot: _Slot, rows_B: Tensor) -> None:
        slot.samples = len(rows_B)
        slot.copied.synchronize()  # what the host is about to overwrite
        for source, pinned in zip(self._sources, slot.pinned, strict=True):
            torch.index_select(source, 0, rows_B, out=pinned[: slot.samples])
        self._stream.wait_event(slot.used)
        with torch.cuda.stream(self._stream):
            for pinned, there in zip(slot.pinned, slot.device, strict=True):
                there[: slot.samples].copy_(pinned[: slot.samples], non_blocking=True)
            slot.copied.record(self._stream)
