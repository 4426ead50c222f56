"""Retraining over Ray: a worker that is killed is replaced, and the numbers are those of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raysweep.launching.launch import launch
from tests.frames import assert_same_numbers

ROOT = Path(__file__).resolve().parents[2]
RETRAIN = {
    "recovery": "retrain",
    "criterion": "wanda",
    "sparsity": 0.5,
    "learning_rate": 0.003,
    "epochs": 80,
}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_worker_is_replaced_and_changes_no_number(make_space, tmp_path):
    space = make_space(
        sweep=[RETRAIN],
        execution={"checkpoint_steps": 20, "threads_per_worker": 1, "shards": 2},
    )
    file = tmp_path / "space.yaml"
    file.write_text(space.resolved_yaml())
    command = [sys.executable, "-m", "raysweep", "launch", str(file), "--storage", str(tmp_path / "ray")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [*command, "--address", "local"],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        folder = tmp_path / "ray" / "tiny" / "retraining"
        deadline = time.monotonic() + 180
        while not list(folder.glob("*/checkpoint/latest")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        killed = [pid for pid in _workers(process.pid) if _kill(pid)]
        _, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert killed
    assert process.returncode == 0, errors
    rows = launch(space, storage=tmp_path / "here", in_process=True)
    assert (rows.status == "finished").all()
    assert_same_numbers(tmp_path / "ray" / "tiny", tmp_path / "here" / "tiny")


def _workers(session: int) -> list[int]:
    """Processes of Ray Train's workers that descend from the launch."""
    listing = subprocess.run(["ps", "-eo", "sid,pid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()[1:]]
    return [int(row[1]) for row in rows if int(row[0]) == session and "TrainWorker" in row[2]]


def _kill(pid: int) -> bool:
    os.kill(pid, signal.SIGKILL)
    return True
