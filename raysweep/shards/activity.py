"""What a shard does, noted around its calls and read from any thread at any time. No torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from raysweep.shards.counts import Counts


@dataclass(frozen=True)
class Activity:
    """counts: since it was loaded;  busy_seconds: of calls, the one in hand included
    stored_bytes: of the dense activations that it keeps;  doing: label of the call in hand, empty where there is none
    """

    counts: Counts = field(default_factory=Counts)
    busy_seconds: float = 0.0
    stored_bytes: int = 0
    doing: str = ""


class Account:
    """Seconds of a shard's calls, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds, self._doing, self._begun = 0.0, "", 0.0

    @contextmanager
    def call(self, label: str) -> Iterator[None]:
        with self._lock:
            self._doing, self._begun = label, time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds += time.perf_counter() - self._begun
                self._doing = ""

    def read(self, counts: Counts, stored_bytes: int) -> Activity:
        with self._lock:
            in_hand = time.perf_counter() - self._begun if self._doing else 0.0
            return Activity(replace(counts), self._seconds + in_hand, stored_bytes, self._doing)
