"""The Grafana dashboard of raysweep's metrics: `python -m raysweep.cluster.grafana FILE.json` writes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from raysweep.results.atomic import write_atomically

WIDTH, HEIGHT = 12, 8  # of a panel; Grafana has 24 columns
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
HERE = '{sweep=~"$sweep"}'  # the sweeps that are chosen above the panels


def dashboard() -> dict[str, Any]:
    """What Grafana imports, or finds in a folder of dashboards such as the one that Ray provides for it."""
    panels = [
        _panel(
            "Trials",
            "short",
            {"{{state}}": f"sum by (sweep, state) (ray_raysweep_trials{HERE})"},
            stacked=True,
        ),
        _panel(
            "Best of each cell",
            "short",
            {"{{cell}}": f"max by (sweep, cell, metric) (ray_raysweep_best{HERE})"},
        ),
        _panel("Busy share of the shards", "percentunit", {"shard {{shard}}": _rate("busy_seconds")}),
        _panel("Units recovered a second", "short", {"shard {{shard}}": _rate("units")}),
        _panel("Tokens trained on a second", "short", {"shard {{shard}}": _rate("trained_tokens")}),
        _panel("Tokens evaluated a second", "short", {"shard {{shard}}": _rate("evaluated_tokens")}),
        _panel(
            "Activations kept",
            "bytes",
            {"shard {{shard}}": f"max by (sweep, shard) (ray_raysweep_stored_bytes{HERE})"},
        ),
    ]
    for number, panel in enumerate(panels):
        place = {"x": number % 2 * WIDTH, "y": number // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT}
        panel |= {"id": number + 1, "gridPos": place}
    return {
        "title": "raysweep",
        "uid": "raysweep",
        "version": 1,
        "schemaVersion": 27,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "panels": panels,
        "templating": {"list": [_source_choice(), _sweep_choice()]},
        "annotations": {"list": []},
    }


def _rate(metric: str) -> str:
    """Of a counter of the shards, a second; over minutes, because it goes up when a call ends."""
    return f"sum by (sweep, shard) (rate(ray_raysweep_{metric}_total{HERE}[5m]))"


def _panel(title: str, unit: str, targets: dict[str, str], stacked: bool = False) -> dict[str, Any]:
    """targets: queries by how their lines are called"""
    drawn = {"lineWidth": 1, "fillOpacity": 10, "stacking": {"mode": "normal" if stacked else "none"}}
    return {
        "title": title,
        "type": "timeseries",
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "custom": drawn}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": query, "legendFormat": name, "datasource": SOURCE}
            for number, (name, query) in enumerate(targets.items())
        ],
    }


def _source_choice() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "refresh": 1, "hide": 2}


def _sweep_choice() -> dict[str, Any]:
    return {
        "name": "sweep",
        "type": "query",
        "datasource": SOURCE,
        "query": "label_values(ray_raysweep_trials, sweep)",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    write_atomically(Path(sys.argv[1]), (json.dumps(dashboard(), indent=1) + "\n").encode())
