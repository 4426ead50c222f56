"""The most memory that a shard has held. No torch."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

LOOK_EVERY_S = 0.05
OWN_MEMORY = "RssAnon:"


@dataclass(frozen=True)
class Peaks:
    """Bytes since its process began. host: of the whole process, without files that are mapped and what processes
    share, as messages of Ray are; 0 = unknown
    device: that the allocator of its GPU has handed out, what compiling took left out; None on a CPU
    """

    host: int
    device: int | None = None


def memory_in_use() -> int:
    """Bytes of this process that lie nowhere else: not those of files that the system has mapped for it, which it takes
    back when it needs them, and not those of Ray's object store. 0 where it does not say."""
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(OWN_MEMORY))
    except (OSError, ValueError):
        return 0


class HostPeak:
    """Looks every so often how much memory this process has in use, until it is closed or forgotten."""

    def __init__(self) -> None:
        self._seen, self._ended = _Highest(), threading.Event()
        weakref.finalize(self, self._ended.set)
        # No method: a thread that holds this object would keep it from being forgotten.
        threading.Thread(target=_watch, args=(self._seen, self._ended), name="memory", daemon=True).start()

    @property
    def bytes(self) -> int:
        self._seen.look()
        return self._seen.bytes

    @property
    def lately(self) -> int:
        """The most since `restart`."""
        self._seen.look()
        return self._seen.lately

    def restart(self) -> None:
        self._seen.lately = 0

    def close(self) -> None:
        """Ends the looking. Closing twice does no harm."""
        self._ended.set()


@dataclass
class _Highest:
    bytes: int = 0
    lately: int = 0

    def look(self) -> None:
        now = memory_in_use()
        self.bytes, self.lately = max(self.bytes, now), max(self.lately, now)


def _watch(seen: _Highest, ended: threading.Event) -> None:
    while not ended.wait(LOOK_EVERY_S):
        seen.look()
