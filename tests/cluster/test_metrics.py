"""Metrics: what a launch and its shards tell Ray, and that the dashboard for Grafana asks for nothing else."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from raysweep.cluster import meter
from raysweep.cluster.grafana import dashboard
from raysweep.cluster.meter import SweepMeter
from raysweep.config.sections import SearchConfig
from raysweep.launching.metering import Metered
from raysweep.launching.progress import Silent
from raysweep.shards import meter as shard_meter
from raysweep.shards.activity import Activity
from raysweep.shards.counts import Counts
from raysweep.shards.meter import ShardMeter
from tests.cluster.machine import ROOT

TOLD: dict[tuple[str, tuple[str, ...]], float] = {}


class Metric:
    """In place of Ray's: keeps what it is told, under the name and the values of its tags."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert re.fullmatch("[a-z_]+", name)
        assert description
        self.name, self.keys, self.tags = name, tag_keys, dict[str, str]()

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.tags = tags

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        given = self.tags | (tags or {})
        assert set(given) == set(self.keys)
        TOLD[self.name, tuple(given[key] for key in self.keys)] = value

    def inc(self, value: float) -> None:
        assert value > 0
        place = self.name, tuple(self.tags[key] for key in self.keys)
        TOLD[place] = TOLD.get(place, 0) + value


@pytest.fixture(autouse=True)
def told(monkeypatch) -> dict[tuple[str, tuple[str, ...]], float]:
    TOLD.clear()
    for module, names in ((meter, ["Gauge"]), (shard_meter, ["Gauge", "Counter"])):
        for name in names:
            monkeypatch.setattr(module, name, Metric)
    return TOLD


def row(value: float | None, sparsity: float, status: str = "finished") -> dict[str, Any]:
    return {"status": status, "model": "m", "sparsity": sparsity, "validation_perplexity": value}


def test_a_launch_tells_its_trials_and_the_best_of_every_cell(told):
    search = SearchConfig(compare_within=("model", "sparsity", "pattern"))
    earlier = [row(9.5, 0.6), row(5.0, 0.5) | {"recovery": "dense"}]
    metered = Metered(Silent(), SweepMeter("s", search.metric), search, earlier)
    cells = {sparsity: f"model=m sparsity={sparsity}" for sparsity in (0.5, 0.6)}
    assert told["raysweep_best", ("s", cells[0.6], "validation_perplexity")] == 9.5
    metered.begin(planned=9, finished=2, failed=1, dashboard=None, others=0)
    states = {state: told["raysweep_trials", ("s", state)] for state in ("finished", "failed", "waiting")}
    assert states == {"finished": 2, "failed": 1, "waiting": 6}
    for value, sparsity in ((7.0, 0.5), (6.0, 0.5), (8.0, 0.5), (9.0, 0.6)):
        metered.row(row(value, sparsity))
    metered.row(row(1.0, 0.5, "failed"))
    metered.row(row(None, 0.5))
    best = {tags[1]: value for (name, tags), value in told.items() if name == "raysweep_best"}
    assert best == {cells[0.5]: 6.0, cells[0.6]: 9.0}
    states = {state: told["raysweep_trials", ("s", state)] for state in ("finished", "failed", "waiting")}
    assert states == {"finished": 7, "failed": 2, "waiting": 0}


def test_a_shard_tells_what_is_new(told):
    one = ShardMeter("s", 3)
    one.note(Activity(Counts(units=2, trained_tokens=100), busy_seconds=0.5, stored_bytes=512))
    one.note(Activity(Counts(3, 100, evaluated_tokens=64), busy_seconds=0.75, stored_bytes=1024))
    assert told == {
        ("raysweep_units", ("s", "3")): 3,
        ("raysweep_trained_tokens", ("s", "3")): 100,
        ("raysweep_evaluated_tokens", ("s", "3")): 64,
        ("raysweep_busy_seconds", ("s", "3")): 0.75,
        ("raysweep_stored_bytes", ("s", "3")): 1024,
    }


def test_the_dashboard_asks_for_what_is_told_and_is_the_file_in_the_checkout(told):
    test_a_launch_tells_its_trials_and_the_best_of_every_cell(told)
    known = {name for name, _ in told}
    TOLD.clear()
    test_a_shard_tells_what_is_new(told)
    counters = {"units", "trained_tokens", "evaluated_tokens", "busy_seconds"}
    for name, _ in told:  # Ray adds its prefix, and to counters a suffix
        known.add(f"{name}_total" if name.removeprefix("raysweep_") in counters else name)
    made = dashboard()
    queries = [target["expr"] for panel in made["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"ray_(raysweep_\w+)", query)}
    assert asked == known - {f"raysweep_{name}" for name in counters}
    assert json.loads((ROOT / "dashboards" / "raysweep.json").read_text()) == made
    places = [tuple(panel["gridPos"].values()) for panel in made["panels"]]
    assert len(set(places)) == len(places)
