"""Retraining over Ray, disturbed: by a killed worker, by Ctrl-C, by a killed driver. The numbers are those of an
undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raysweep.config.space import SearchSpace
from raysweep.launching.launch import launch
from tests.frames import assert_same_numbers

ROOT = Path(__file__).resolve().parents[2]
RAY_AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}  # which see only after a while that all are gone
RETRAIN = {
    "recovery": "retrain",
    "criterion": "wanda",
    "sparsity": 0.5,
    "learning_rate": 0.003,
    "epochs": 80,
}


@pytest.fixture
def space(make_space: Any) -> SearchSpace:
    execution = {"checkpoint_steps": 20, "threads_per_worker": 1, "shards": 2}
    space: SearchSpace = make_space(sweep=[RETRAIN], execution=execution)
    return space


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_worker_is_replaced_and_changes_no_number(space, tmp_path):
    with _launched(space, tmp_path) as process:
        killed = [pid for pid in _workers(process.pid) if _kill(pid)]
        _, errors = process.communicate(timeout=600)
    assert killed
    assert process.returncode == 0, errors
    _check_undisturbed(space, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_launch_that_ends_while_it_retrains_is_continued_by_the_next(space, tmp_path, number, status):
    with _launched(space, tmp_path) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    deadline = time.monotonic() + 60
    while _of_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.5)
    left = {command.split()[0] for _, command in _of_session(process.pid)}
    assert not left or (number == signal.SIGKILL and left <= RAY_AGENTS), left
    launch(space, storage=tmp_path / "ray", address="local")
    _check_undisturbed(space, tmp_path)


@contextmanager
def _launched(space: SearchSpace, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A launch over Ray that has written a checkpoint."""
    file = folder / "space.yaml"
    file.write_text(space.resolved_yaml())
    command = [sys.executable, "-m", "raysweep", "launch", str(file), "--storage", str(folder / "ray")]
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
        deadline = time.monotonic() + 180
        while not list((folder / "ray" / "tiny" / "retraining").glob("*/checkpoint/latest")):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()


def _check_undisturbed(space: SearchSpace, folder: Path) -> None:
    rows = launch(space, storage=folder / "here", in_process=True)
    assert (rows.status == "finished").all()
    assert_same_numbers(folder / "ray" / "tiny", folder / "here" / "tiny")


def _workers(session: int) -> list[int]:
    """Processes of Ray Train's workers that descend from the launch."""
    return [int(pid) for pid, command in _of_session(session) if "TrainWorker" in command]


def _of_session(session: int) -> list[tuple[str, str]]:
    """Living processes that descend from the launch."""
    listing = subprocess.run(
        ["ps", "-eo", "sid,stat,pid,args"], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 3) for line in listing.splitlines()[1:]]
    return [(row[2], row[3]) for row in rows if int(row[0]) == session and not row[1].startswith("Z")]


def _kill(pid: int) -> bool:
    os.kill(pid, signal.SIGKILL)
    return True
