"""Some hundred generated inputs, and a few real runs; `benchmarks/fuzz.py` makes them and judges how each ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz.py"


def test_generated_inputs_are_valid_or_refused_and_nothing_else(tmp_path):
    command = [sys.executable, str(SCRIPT), "--inputs", "200", "--runs", "3", "--seed", "7"]
    ran = subprocess.run(
        [*command, "--site", str(tmp_path / "site")], capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    figures = {figure["figure"]: figure for figure in map(json.loads, ran.stdout.splitlines())}
    assert figures["fuzz"]["inputs"] == 200
    for kind in ("yaml", "space", "data", "results", "weights", "config", "command"):
        assert figures[kind]["valid"] > 0, figures[kind]
        assert figures[kind]["refused"] > 0, figures[kind]
    runs = figures["real runs"]
    assert runs["all finished"] + runs.get("some failed", 0) == 3
    assert runs["rows"]["finished"] > 3
