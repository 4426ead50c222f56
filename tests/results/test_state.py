"""The state of a sweep is what its launching process last wrote, or interrupted when that process is gone."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from raysweep.errors import RaysweepError
from raysweep.results.state import ShardState, SweepState


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_state_comes_back_as_it_was_written(tmp_path):
    activity = (
        ShardState(3, 1 << 20, "wanda 0.5: recover 0.attention", 0.9, 0.1, 2e3, 1e3),
        ShardState(0, 0, ""),
    )
    counts = {"planned": 8, "finished": 3, "failed": 1, "running": 2, "shards": 2}
    written = SweepState("a", **counts, dashboard="127.0.0.1:8265", activity=activity)
    written = written.write(tmp_path)
    assert SweepState.read(tmp_path) == written
    assert (written.pid, written.host, written.state) == (os.getpid(), socket.gethostname(), "running")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_running_sweep_whose_process_is_gone_is_interrupted(tmp_path, dead_pid):
    SweepState("a", pid=dead_pid, running=2, activity=(ShardState(0, 0, "load"),)).write(tmp_path)
    state = SweepState.read(tmp_path)
    assert (state.state, state.running, state.activity) == ("interrupted", 0, ())


def test_processes_of_other_hosts_and_ended_sweeps_are_left_alone(tmp_path, dead_pid):
    SweepState("a", pid=dead_pid, host="elsewhere.example").write(tmp_path)
    assert SweepState.read(tmp_path).state == "running"
    for ended in ("finished", "failed", "interrupted"):
        SweepState("a", state=ended, pid=dead_pid).write(tmp_path)
        assert SweepState.read(tmp_path).state == ended


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "3", '{"name": "a", "pid": "x", "state": "running"}']
)
def test_what_is_no_state_reads_as_none(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    assert SweepState.read(tmp_path) is None
    assert SweepState.read(tmp_path / "missing") is None


def test_fields_of_other_versions_are_passed_over(tmp_path):
    written = SweepState("a", finished=3).write(tmp_path)
    stored = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**stored, "weather": "fine"}))
    assert SweepState.read(tmp_path) == written


def test_an_unknown_state_is_refused(tmp_path):
    with pytest.raises(RaysweepError, match="paused"):
        replace(SweepState("a"), state="paused").write(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"started_at": "0:0"},
        {"started_at": "2026-11-28T10:00:00"},
        {"updated_at": 5},
        {"planned": "8"},
        {"failed": None},
        {"shards": [1]},
        {"pid": True},
        {"host": 5},
        {"dashboard": {}},
        {"state": ["running"]},
        {"activity": 5},
        {"activity": [5]},
        {"activity": [{"units": 1}]},
        {"activity": [asdict(ShardState(1, 2, "")) | {"units": -1}]},
        {"activity": [asdict(ShardState(1, 2, "")) | {"stored_bytes": "2"}]},
        {"activity": [asdict(ShardState(1, 2, "")) | {"doing": None}]},
        {"activity": [asdict(ShardState(1, 2, "")) | {"busy": "much"}]},
        {"activity": [asdict(ShardState(1, 2, "")) | {"busy": float("nan")}]},
    ],
    ids=str,
)
def test_a_state_that_no_launch_has_written_is_none(tmp_path, wrong):
    SweepState("a", state="finished").write(tmp_path)
    stored = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(stored | wrong))
    assert SweepState.read(tmp_path) is None
