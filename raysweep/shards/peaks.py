"""The most memory that a shard has held. No torch."""

from __future__ import annotations

import threading
import time
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
    """Looks every so often how much memory this process has in use."""

    def __init__(self) -> None:
        self._highest = 0
        threading.Thread(target=self._watch, name="memory", daemon=True).start()

    @property
    def bytes(self) -> int:
        self._look()
        return self._highest

    def _look(self) -> None:
        self._highest = max(self._highest, memory_in_use())

    def _watch(self) -> None:
        while True:
            self._look()
            time.sleep(LOOK_EVERY_S)
