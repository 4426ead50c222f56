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

from raysweep.reconstruction.activations import batches, fetch
from raysweep.reconstruction.graphs import sending, stream_of

AHEAD = 2  # steps whose samples are on their way, or in hand
SAMPLES = "samples"  # what their stream is for
STRAIGHT_BYTES = 1 << 20  # of a sample that is worth a copy of its own


@dataclass
class _Slot:
    """Room for the samples of one step: where the host puts them, unless the device takes them from where they lie, and
    where the device finds them."""

    pinned: list[Tensor | None]
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


def one_ahead(stored: Tensor, pieces: Sequence[slice], device: torch.device) -> Iterator[Tensor]:
    """Samples of each piece on the device: the first on their way at once, the others while one before is in use,
    where a GPU copies them by itself.

    stored: (S, ...)
    """
    if not stored.is_pinned():
        return (fetch(stored, rows, device) for rows in pieces)
    return _one_ahead(_Sending(stored[pieces[0]], device), stored, pieces[1:], device)


def _one_ahead(
    coming: _Sending, stored: Tensor, rest: Sequence[slice], device: torch.device
) -> Iterator[Tensor]:
    for rows in rest:
        following = _Sending(stored[rows], device)
        yield coming.arrived()
        coming = following
    yield coming.arrived()


class _Sending:
    """A copy on its way, beside what the device is given to do from here on."""

    def __init__(self, source: Tensor, device: torch.device) -> None:
        self._there = torch.empty_like(source, device=device)
        with sending(device, SAMPLES) as self._arrived:
            self._there.copy_(source, non_blocking=True)
        # nobody may ask for it any more, should the work beside it fail
        self._there.record_stream(stream_of(device, SAMPLES))

    def arrived(self) -> Tensor:
        torch.cuda.current_stream(self._there.device).wait_event(self._arrived)
        return self._there


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
            pinned, there = list[Tensor | None](), list[Tensor]()
            for source in sources:
                shape, dtype = (largest, *source.shape[1:]), source.dtype
                there.append(torch.empty(shape, dtype=dtype, device=device))
                straight = _goes_straight(source)
                pinned.append(None if straight else torch.empty(shape, dtype=dtype, pin_memory=True))
            self._free.put(_Slot(pinned, there))
        self._stream = stream_of(device, SAMPLES)
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
            if pinned is not None:
                torch.index_select(source, 0, rows_B, out=pinned[: slot.samples])
        self._stream.wait_event(slot.used)
        with torch.cuda.stream(self._stream):
            for source, pinned, there in zip(self._sources, slot.pinned, slot.device, strict=True):
                if pinned is not None:
                    there[: slot.samples].copy_(pinned[: slot.samples], non_blocking=True)
                else:
                    _copy_rows(source, rows_B.tolist(), there)
            slot.copied.record(self._stream)


def _goes_straight(source: Tensor) -> bool:
    """Whether the device copies samples from where they lie: it can, and they are worth a copy each."""
    return source.is_pinned() and source[0].nbytes >= STRAIGHT_BYTES


def _copy_rows(source: Tensor, rows: list[int], there: Tensor) -> None:
    """Without waiting; rows that follow one another at once."""
    done = 0
    while done < len(rows):
        run = next((k for k in range(done + 1, len(rows)) if rows[k] != rows[k - 1] + 1), len(rows)) - done
        there[done : done + run].copy_(source[rows[done] : rows[done] + run], non_blocking=True)
        done += run
