"""Sweeps through real Ray actors and Ray Tune on a cluster that was running before and runs on afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.tune import Trainable
from ray.tune.execution.class_cache import _ActorClassCache as ActorClassCache

from raysweep.errors import RaysweepError, ShardLostError, UsageError
from raysweep.launching.launch import launch
from raysweep.launching.progress import Silent
from raysweep.results.reader import load_results
from raysweep.shards.group import RayGroup, Resources
from raysweep.shards.group_info import ShardSpec
from tests.frames import assert_same_numbers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a running cluster with two CPUs."""
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield running.address
    running.shutdown()


@pytest.fixture(scope="module")
def twin(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("twin")


@pytest.mark.parametrize(("shards", "concurrent"), [(2, 4), pytest.param(3, 1, marks=pytest.mark.long)])
def test_ray_and_the_twin_in_process_give_the_same_numbers(
    make_space, tmp_path, twin, tiny_llama, cluster, shards, concurrent
):
    if not (twin / "tiny").exists():
        launch(make_space(execution={"shards": 1}), storage=twin, in_process=True)
    execution = {"shards": shards, "concurrent_trials": concurrent}
    rows = launch(make_space(execution=execution), storage=tmp_path, address=cluster)
    assert (rows.status == "finished").all()
    assert (rows.shards == shards).all()
    assert_same_numbers(twin / "tiny", tmp_path / "tiny")
    assert not ray.is_initialized()


@pytest.mark.long
@pytest.mark.parametrize("shards", [1, 2])
def test_replicas_take_trials_and_no_number_differs(make_space, tmp_path, tiny_llama, cluster, shards):
    """Masks behind pruned blocks lie in the shards of one replica; the perplexity of the pruned model serves all."""
    recovered = {
        "recovery": "reconstruct",
        "criterion": ["wanda", "magnitude"],
        "sparsity": 0.5,
        "granularity": "subblock",
        "statistics_stream": ["dense", "pruned"],
        "learning_rate": [1e-3, 3e-3, 1e-2],
    }
    space = {"sweep": [recovered]}
    launch(make_space(**space), storage=tmp_path / "twin", in_process=True)
    execution = {"shards": shards, "replicas": 2, "concurrent_trials": 2}
    rows = launch(make_space(**space, execution=execution), storage=tmp_path, address=cluster, trace=True)
    assert (rows.status == "finished").all()
    assert (rows.shards == shards).all()
    assert_same_numbers(tmp_path / "twin" / "tiny", tmp_path / "tiny")
    events = json.loads((tmp_path / "tiny" / "trace.json").read_text())["traceEvents"]
    lines = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    trials_of: dict[str, set[str]] = {}
    for event in events:
        if event["ph"] == "X" and event["name"].startswith("recover "):
            trials_of.setdefault(lines[event["pid"]], set()).add(event["args"]["trial"])
    assert set(trials_of) == {f"shard {number}" for number in range(2 * shards)}
    first, second = trials_of["shard 0"], trials_of[f"shard {shards}"]
    assert not first & second
    assert min(len(first), len(second)) >= 3
    dense = [event for event in events if event.get("name", "").startswith("dense ")]
    assert len({lines[event["pid"]] for event in dense}) == 2 * shards


@pytest.mark.long
def test_a_shard_that_ends_is_replaced_and_no_number_differs(make_space, tmp_path, twin, tiny_llama, cluster):
    """One is killed while it loads, one of the next group before its dense pass, one when two trials have rows."""
    if not (twin / "tiny").exists():
        launch(make_space(execution={"shards": 1}), storage=twin, in_process=True)
    progress, rows, stages, killed = Silent(), list[str](), list[str](), list[str]()
    of_others = set[str]()  # names of a group that has just ended may be there for a while

    def names_of_shards() -> list[str]:
        names = (each["name"] for each in ray.util.list_named_actors(all_namespaces=True))
        return [name for name in names if name.endswith("/1")]

    def kill_a_shard() -> None:
        (name,) = (name for name in names_of_shards() if name not in {*killed, *of_others})
        ray.kill(ray.get_actor(name, "raysweep"))
        killed.append(name)

    def kill_one_that_loads() -> None:
        while not killed:
            with suppress(ValueError):  # not there yet
                kill_a_shard()

    def row(row) -> None:
        rows.append(row["status"])
        if len(rows) == 2:
            kill_a_shard()

    def stage(text: str) -> None:
        stages.append(text)
        if text.startswith("Loading") and not killed:
            of_others.update(names_of_shards())
            threading.Thread(target=kill_one_that_loads, daemon=True).start()
        if text.startswith("Dense pass") and len(killed) == 1:
            kill_a_shard()

    progress.row, progress.stage = row, stage
    launch(make_space(execution={"shards": 2}), storage=tmp_path, address=cluster, progress=progress)
    assert sum(text.startswith("Going on with new shards") for text in stages) == 3
    assert rows == ["finished"] * 9
    again = load_results(tmp_path / "tiny").retries
    assert again.max() == 1
    assert 1 <= again.sum() <= 3  # the trials that were in flight when the third one ended
    assert_same_numbers(twin / "tiny", tmp_path / "tiny")


def test_processes_of_trials_have_no_environment_of_their_own(make_space, tmp_path, cluster):
    """Which Ray would begin Python twice for. Tune gives them one by default."""
    launch(make_space(), storage=tmp_path, address=cluster)
    actor = ActorClassCache().get(Trainable)
    assert not actor._default_options["runtime_env"]


@pytest.mark.long
def test_trials_share_a_few_processes(make_space, tmp_path, cluster):
    """However short they are: a process takes seconds to start, and Tune gives up what it starts too often."""
    sparsities = [round(0.1 + 0.05 * k, 2) for k in range(12)]
    space = make_space(sweep=[{"recovery": "none", "criterion": "magnitude", "sparsity": sparsities}])
    progress, processes = Silent(), list[int]()
    progress.row = lambda row: processes.append(row["pid"])
    launch(space, storage=tmp_path, address=cluster, progress=progress)
    assert len(processes) == 13
    assert len(set(processes)) <= 3


def test_the_cluster_is_left_running_and_empty(make_space, tmp_path, cluster):
    rows = launch(make_space(), storage=tmp_path, address=cluster, trace=True)
    events = json.loads((tmp_path / "tiny" / "trace.json").read_text())["traceEvents"]
    traced = {event["args"]["trial"] for event in events if event.get("cat") == "recover"}
    assert traced, "no call of a trial in the trace"
    assert not traced & set(rows.trial_id), "a trace names trials as people do"
    ray.init(address=cluster, namespace="raysweep", log_to_driver=False)
    try:
        assert ray.util.list_named_actors(all_namespaces=True) == []
        deadline = time.monotonic() + 30
        while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert ray.available_resources()["CPU"] == 2
    finally:
        ray.shutdown()


def test_errors_of_shards_arrive_as_what_they_are(tiny_llama, cluster):
    spec = ShardSpec(str(tiny_llama), None, False, "float32", 0, 4)
    ray.init(address=cluster, namespace="raysweep", log_to_driver=False)
    try:
        with RayGroup.start("errors", [spec], Resources(0.5), timeout_s=120) as group:
            with pytest.raises(RaysweepError, match="KeyError"):
                group.result(group.submit(0, 0, "forward", "unknown trial", True, "text", 0, 1, None))
            assert group.result(group.submit(0, 0, "text_batches", 3, 2048)) == [(0, 1), (1, 2), (2, 3)]
            group.submit(0, 0, "release", "nobody")
            ray.kill(group.actors[0])
            with pytest.raises(ShardLostError):
                _ask_until_it_fails(group)  # a call may still overtake the kill
        with pytest.raises(UsageError, match="nowhere"):
            RayGroup.start(
                "wrong", [ShardSpec("./nowhere", None, False, "float32", 0, 4)], Resources(0.5), 120
            )
        with pytest.raises(RaysweepError, match="not ready after 3 s"):
            RayGroup.start("large", [spec], Resources(50.0), timeout_s=3)
        assert ray.util.list_named_actors(all_namespaces=True) == []
    finally:
        ray.shutdown()


def _ask_until_it_fails(group: RayGroup) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        group.result(group.submit(0, 0, "text_batches", 3, 2048))


@pytest.mark.long
def test_numerical_failures_keep_their_kind_over_ray(make_space, space_dict, tmp_path, cluster):
    space_dict["sweep"] = [
        {
            "recovery": "reconstruct",
            "criterion": "wanda",
            "sparsity": 0.5,
            "granularity": "block",
            "learning_rate": [1e30, 0.01],
        }
    ]
    rows = launch(make_space(), storage=tmp_path, address=cluster).set_index("learning_rate")
    assert rows.status.loc[1e30] == "failed"
    assert "not finite" in rows.error.loc[1e30]
    assert rows.status.loc[0.01] == "finished"


@pytest.mark.long
def test_an_interrupt_keeps_finished_rows_and_leaves_no_process(make_space, space_dict, tmp_path):
    space_dict["sweep"][1]["epochs"] = 40
    space = make_space()
    file = tmp_path / "space.yaml"
    file.write_text(space.resolved_yaml())
    command = [
        sys.executable,
        "-m",
        "raysweep",
        "launch",
        str(file),
        "--storage",
        str(tmp_path),
        "--address",
        "local",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "tiny" / "unfinished").glob("*/*.safetensors")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert any("raylet" in line for line in _processes_of_session(process.pid))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    kept = load_results("tiny", tmp_path)
    assert 0 < len(kept) < 9
    assert "finishing what is in hand" in errors
    assert re.search(r"rows? and \d+ recovered units? kept in", errors)
    assert (kept.status == "finished").all()
    deadline = time.monotonic() + 20  # Ray's own processes may outlive the command by a moment
    while _processes_of_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _processes_of_session(process.pid) == []
    assert not list((tmp_path / "tiny").rglob(".*.tmp"))


def _processes_of_session(session: int) -> list[str]:
    """Command lines of living processes that descend from the launch, zombies left out."""
    listing = subprocess.run(
        ["ps", "-ewwo", "sid,stat,args"], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()[1:]]
    return [row[2] for row in rows if int(row[0]) == session and not row[1].startswith("Z")]
