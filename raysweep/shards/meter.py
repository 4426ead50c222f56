"""What a shard does, as metrics of Ray, which its nodes export to Prometheus as `ray_raysweep_...`."""

from __future__ import annotations

import time
from dataclasses import asdict

from ray.util.metrics import Counter, Gauge

from raysweep.shards.counts import Counts

TAGS = ("sweep", "shard")
HELP = {
    "units": "units that the shard has recovered",
    "trained_tokens": "tokens that have passed through units in training",
    "evaluated_tokens": "tokens that have passed through the head",
}
STORE_EVERY_S = 5.0  # between two looks at what is stored


class ShardMeter:
    """Tells Ray what has changed since it last did."""

    def __init__(self, sweep: str, shard: int) -> None:
        tags = {"sweep": sweep, "shard": str(shard)}
        self._known = Counts()
        self._counters = {name: Counter(f"raysweep_{name}", said, TAGS) for name, said in HELP.items()}
        self._busy = Counter("raysweep_busy_seconds", "seconds of calls that the shard has served", TAGS)
        self._stored = Gauge("raysweep_stored_bytes", "bytes of activations that the shard keeps", TAGS)
        self._looked = 0.0
        for metric in (*self._counters.values(), self._busy, self._stored):
            metric.set_default_tags(tags)

    def note(self, counts: Counts, busy_seconds: float) -> None:
        """After a call: all that was done so far, and how long it took."""
        for name, count in asdict(counts).items():
            if (more := count - getattr(self._known, name)) > 0:
                self._counters[name].inc(more)
        self._known = Counts(**asdict(counts))
        if busy_seconds > 0:
            self._busy.inc(busy_seconds)

    def wants_stored(self) -> bool:
        """Whether it is time to look again at what is stored."""
        return time.monotonic() - self._looked > STORE_EVERY_S

    def note_stored(self, stored_bytes: int) -> None:
        self._looked = time.monotonic()
        self._stored.set(stored_bytes)
