"""What a range of blocks works out once and every later trial shares: masks, errors, inputs of linears."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")


class Stopwatch:
    """Busy seconds: of this process's cores on a CPU; on a device elapsed ones, with the device drained."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()

    def seconds(self) -> float:
        return self._now() - self._start

    def _now(self) -> float:
        if self._device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self._device)
        return time.perf_counter()


class Knowledge:
    """Values by key, each with the seconds that it took. Past `limit_bytes` the least recently used go.

    `saved_seconds` adds up what the values found here would have cost again, so that a trial can say what it
    would have cost alone. `made` counts the values that were made.
    """

    def __init__(self, device: torch.device, limit_bytes: int) -> None:
        self.device, self.limit_bytes = device, limit_bytes
        self.saved_seconds = 0.0
        self.made = 0
        self._values: OrderedDict[Hashable, tuple[Any, float, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of `key`, made now if it is not known."""
        if key in self._values:
            self._values.move_to_end(key)
            value, seconds, _ = self._values[key]
            self.saved_seconds += seconds
            return value  # type: ignore[no-any-return]
        saved_before, watch = self.saved_seconds, Stopwatch(self.device)
        value = make()
        self.made += 1
        seconds = watch.seconds() + self.saved_seconds - saved_before
        self._values[key] = (value, seconds, _nbytes(value))
        self._forget_oldest()
        return value

    def clear(self) -> None:
        self._values.clear()

    @property
    def nbytes(self) -> int:
        return sum(size for _, _, size in self._values.values())

    def _forget_oldest(self) -> None:
        while self.nbytes > self.limit_bytes and len(self._values) > 1:
            self._values.popitem(last=False)


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_nbytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_nbytes(item) for item in value)
    return 0
