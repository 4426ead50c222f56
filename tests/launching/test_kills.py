"""Processes of a sweep are killed at random, ten times; `benchmarks/kills.py` checks that nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kills.py"


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_ten_kills_lose_nothing(tmp_path):
    command = [sys.executable, str(SCRIPT), "--kills", "10", "--seed", "2", "--storage", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=2300)
    assert ran.returncode == 0, ran.stderr[-3000:] + ran.stdout[-3000:]
    figures = [json.loads(line) for line in ran.stdout.splitlines()]
    rounds = [figure for figure in figures if figure["figure"].startswith("round")]
    assert rounds, ran.stdout
    kills = figures[-1]
    assert sum(kills[kind] for kind in ("driver", "raylet", "shard", "retraining worker")) == 10
