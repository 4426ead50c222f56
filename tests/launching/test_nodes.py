"""Nodes of a cluster that leave while a sweep runs: it goes on with those that are left, or waits for another."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raysweep.launching.launch import launch
from raysweep.results.reader import load_results
from tests.frames import assert_same_numbers

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

SMALL, LARGE = 300 << 20, 6 << 30  # bytes: no shard fits into the first, both do into the second
OBJECTS = 80 << 20  # bytes of a node's object store, the least that Ray takes


@contextmanager
def cluster_of(*memories: int) -> Iterator[tuple[Any, list[Any]]]:
    """A Ray cluster with nodes of a CPU and so many bytes each, and its nodes."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        nodes = [add_node(cluster, memory) for memory in memories]
        yield cluster, nodes
    finally:
        cluster.shutdown()


def add_node(cluster: Any, memory: int) -> Any:
    return cluster.add_node(
        num_cpus=1, memory=memory - OBJECTS, object_store_memory=OBJECTS, include_dashboard=False
    )


@contextmanager
def launched(space, storage: Path, address: str) -> Iterator[subprocess.Popen[str]]:
    """The sweep as a process of its own, whose words go to launch.txt."""
    storage.mkdir()
    (storage / "space.yaml").write_text(space.resolved_yaml())
    command = [sys.executable, "-m", "raysweep", "launch", str(storage / "space.yaml")]
    command += ["--storage", str(storage), "--address", address, "--json"]
    # without RAY_ADDRESS and the like; whether there is a token is what the cluster was started with
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") or name == "RAY_AUTH_MODE"
    }
    with open(storage / "launch.txt", "w") as words:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=words, text=True
        )
    try:
        yield process
        assert process.wait(300) == 0, (storage / "launch.txt").read_text()
    finally:
        process.kill()
        process.wait()


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], storage: Path) -> None:
    deadline = time.monotonic() + 200
    while not what():
        words = (storage / "launch.txt").read_text()
        assert process.poll() is None, words
        assert time.monotonic() < deadline, words
        time.sleep(0.05)


@pytest.fixture
def space(make_space):
    """Two shards, and trials that leave units while they are in flight."""
    group = {"recovery": "reconstruct", "criterion": "wanda", "sparsity": 0.5, "epochs": 20}
    return make_space(
        sweep=[
            {"recovery": "none", "criterion": "magnitude", "sparsity": 0.5},
            group | {"granularity": ["matrix", "block", "window:3"], "learning_rate": 0.01},
            group | {"granularity": "block", "learning_rate": 0.01, "input_stream": "pruned"},
        ],
        execution={"shards": 2},
    )


def check(whole: Path, storage: Path) -> None:
    assert (load_results(storage / "tiny").status == "finished").all()
    assert_same_numbers(whole / "tiny", storage / "tiny")
    assert not (storage / "tiny" / "unfinished").exists()


def test_a_node_that_leaves_takes_no_number_with_it(space, tmp_path):
    whole, storage = tmp_path / "whole", tmp_path / "again"
    launch(space, storage=whole, in_process=True)
    with (
        cluster_of(LARGE, LARGE) as (cluster, nodes),
        launched(space, storage, cluster.address) as process,
    ):
        wait_for(lambda: list(storage.glob("tiny/unfinished/*/*.safetensors")), process, storage)
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_for(lambda: "Going on with new shards" in (storage / "launch.txt").read_text(), process, storage)
    check(whole, storage)


def test_where_no_other_node_can_hold_the_model_a_sweep_waits_for_one(space, tmp_path):
    whole, storage = tmp_path / "whole", tmp_path / "again"
    launch(space, storage=whole, in_process=True)
    with (
        cluster_of(SMALL, LARGE) as (cluster, nodes),
        launched(space, storage, cluster.address) as process,
    ):
        wait_for(lambda: list(storage.glob("tiny/unfinished/*/*.safetensors")), process, storage)
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_for(lambda: "Waiting for other nodes" in (storage / "launch.txt").read_text(), process, storage)
        assert "of host memory, and there are 300.0 MiB" in (storage / "launch.txt").read_text()
        add_node(cluster, LARGE)
    check(whole, storage)
