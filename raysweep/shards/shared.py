"""Results that several trials need and one of them computes: claimed, published, or given up again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from raysweep.errors import RaysweepError

Claim = tuple[Literal["yours", "wait", "done"], Any]

POLL_S = 0.02


@dataclass
class _Entry:
    owner: str
    done: bool = False
    value: Any = None


class SharedResults:
    """A table of claims. Safe to call from several threads; every call returns at once."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._arrived: set[str] = set()
        self._lock = threading.Lock()

    def claim(self, key: str, owner: str) -> Claim:
        """`yours`: compute it, then publish or abandon; `wait`: another does; `done`: here is the value."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._entries[key] = _Entry(owner)
                return "yours", None
            return ("done", entry.value) if entry.done else ("wait", None)

    def publish(self, key: str, value: Any) -> None:
        with self._lock:
            self._entries[key].value = value
            self._entries[key].done = True

    def abandon(self, owner: str) -> None:
        """Gives up all claims of an owner that have not been published, so that another may compute them."""
        with self._lock:
            for key in [
                key for key, entry in self._entries.items() if entry.owner == owner and not entry.done
            ]:
                del self._entries[key]

    def arrive(self, who: str) -> int:
        """Notes that `who` is here; returns how many are."""
        with self._lock:
            self._arrived.add(who)
            return len(self._arrived)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._arrived.clear()


def share(
    key: str,
    owner: str,
    make: Callable[[], Any],
    claim: Callable[[str, str], Claim],
    publish: Callable[[str, Any], None],
    abandon: Callable[[str], None],
) -> Any:
    """The value of `key`: made here if nobody has begun it, else waited for. A failure passes the work on."""
    while True:
        state, value = claim(key, owner)
        if state == "done":
            return value
        if state == "yours":
            try:
                value = make()
            except BaseException:
                with suppress(RaysweepError):  # the table may have gone with its shard
                    abandon(owner)
                raise
            publish(key, value)
            return value
        time.sleep(POLL_S)
