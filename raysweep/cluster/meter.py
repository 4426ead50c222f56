"""How far a sweep is, as metrics of Ray, which the launching node exports to Prometheus as `ray_raysweep_...`."""

from __future__ import annotations

from ray.util.metrics import Gauge


class SweepMeter:
    """Trials by state, and the best of each cell by the sweep's metric."""

    def __init__(self, sweep: str, metric: str) -> None:
        self._sweep, self._metric = sweep, metric
        self._trials = Gauge("raysweep_trials", "trials of the sweep by state", ("sweep", "state"))
        self._best = Gauge(
            "raysweep_best", "the best trial of a cell, by the metric", ("sweep", "cell", "metric")
        )

    def trials(self, **states: int) -> None:
        for state, number in states.items():
            self._trials.set(number, {"sweep": self._sweep, "state": state})

    def best(self, cell: str, value: float) -> None:
        self._best.set(value, {"sweep": self._sweep, "cell": cell, "metric": self._metric})
