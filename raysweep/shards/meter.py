"""What a shard does, as metrics of Ray, which its nodes export to Prometheus as `ray_raysweep_...`."""

from __future__ import annotations

from dataclasses import asdict

from ray.util.metrics import Counter, Gauge

from raysweep.shards.activity import Activity

TAGS = ("sweep", "shard")
HELP = {
    "units": "units that the shard has recovered",
    "trained_tokens": "tokens that have passed through units in training",
    "evaluated_tokens": "tokens that have passed through the head",
}


class ShardMeter:
    """Tells Ray what has changed since it last did."""

    def __init__(self, sweep: str, shard: int) -> None:
        tags = {"sweep": sweep, "shard": str(shard)}
        self._known = Activity()
        self._counters = {name: Counter(f"raysweep_{name}", said, TAGS) for name, said in HELP.items()}
        self._busy = Counter("raysweep_busy_seconds", "seconds of calls that the shard has served", TAGS)
        self._stored = Gauge("raysweep_stored_bytes", "bytes of activations that the shard keeps", TAGS)
        for metric in (*self._counters.values(), self._busy, self._stored):
            metric.set_default_tags(tags)

    def note(self, activity: Activity) -> None:
        """After a call: all that was done so far."""
        for name, count in asdict(activity.counts).items():
            if (more := count - getattr(self._known.counts, name)) > 0:
                self._counters[name].inc(more)
        if (seconds := activity.busy_seconds - self._known.busy_seconds) > 0:
            self._busy.inc(seconds)
        if activity.stored_bytes != self._known.stored_bytes:
            self._stored.set(activity.stored_bytes)
        self._known = activity
