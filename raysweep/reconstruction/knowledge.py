"""What a range of blocks works out once and every later trial shares: masks, errors, inputs of linears."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
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


@dataclass
class _Entry:
    """seconds: without those of other values that were asked for meanwhile, which are `needs`."""

    value: Any
    seconds: float
    nbytes: int
    needs: tuple[Hashable, ...]


@dataclass
class _Making:
    """A value that is being made: what it has asked for so far, and the seconds that making these took."""

    needs: list[Hashable] = field(default_factory=list)
    inner_seconds: float = 0.0


class Knowledge:
    """Values by key, each with the seconds that it took. Past `limit_bytes` the least recently used go.

    `saved_seconds` adds up what values that were found here would have cost again, so that a trial can say what it
    would have cost alone: within `charged_to` each value counts once, and not if it was made there.
    `made` counts the values that were made.
    """

    def __init__(self, device: torch.device, limit_bytes: int) -> None:
        self.device, self.limit_bytes = device, limit_bytes
        self.saved_seconds = 0.0
        self.made = 0
        self.nbytes = 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._kept: dict[Hashable, Any] = {}
        self._making: list[_Making] = []
        self._accounts: dict[str, set[Hashable]] = {}
        self._charged: set[Hashable] = set()

    def keep(self, key: Hashable, value: Any) -> None:
        """Holds on to a value that cannot be made again from what is here, until `clear`."""
        self.nbytes += _nbytes(value) - _nbytes(self._kept.get(key))
        self._kept[key] = value
        self._forget_oldest()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of `key`, made now if it is not known."""
        if key in self._kept:
            return self._kept[key]  # type: ignore[no-any-return]
        if self._making:
            self._making[-1].needs.append(key)
        if key in self._entries:
            self._entries.move_to_end(key)
            self._charge(key)
            return self._entries[key].value  # type: ignore[no-any-return]
        return self._made(key, make)

    @contextmanager
    def charged_to(self, account: str) -> Iterator[None]:
        """Within the context, values found here are charged to `account`, each once."""
        before, self._charged = self._charged, self._accounts.setdefault(account, set())
        try:
            yield
        finally:
            self._charged = before

    def close_account(self, account: str) -> None:
        self._accounts.pop(account, None)

    def clear(self) -> None:
        self._entries.clear()
        self._kept.clear()
        self.nbytes = 0

    def _made(self, key: Hashable, make: Callable[[], Value]) -> Value:
        making, watch = _Making(), Stopwatch(self.device)
        self._making.append(making)
        try:
            value = make()
        finally:
            self._making.pop()
        seconds = watch.seconds()
        if self._making:
            self._making[-1].inner_seconds += seconds
        self._charged.add(key)
        self.made += 1
        self._entries[key] = _Entry(
            value, seconds - making.inner_seconds, _nbytes(value), tuple(making.needs)
        )
        self.nbytes += self._entries[key].nbytes
        self._forget_oldest()
        return value

    def _charge(self, key: Hashable) -> None:
        if key not in self._charged and key in self._entries:
            self._charged.add(key)
            self.saved_seconds += self._entries[key].seconds
            for needed in self._entries[key].needs:
                self._charge(needed)

    def _forget_oldest(self) -> None:
        while self.nbytes > self.limit_bytes and len(self._entries) > 1:
            _, entry = self._entries.popitem(last=False)
            self.nbytes -= entry.nbytes


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_nbytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_nbytes(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return sum(_nbytes(getattr(value, each.name)) for each in fields(value))
    return 0
