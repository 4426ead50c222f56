"""A cluster of three hosts from `ray up` to `ray down`: sweeps, a host that dies, one that is added, jobs of a laptop.

The tests are the days of one cluster's life, in their order. What rows say is bitwise what one machine finds.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysweep.config.space import SearchSpace
from raysweep.launching.launch import launch
from raysweep.results.reader import load_results
from tests.cluster.machine import ROOT, Ended, Machine, kill, make_key, network, started
from tests.frames import assert_same_numbers

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

HEAD, OTHERS, ADDED, LAPTOP = "10.77.0.1", ["10.77.0.2", "10.77.0.3"], "10.77.0.4", "10.77.0.100"
MASKS = {"criterion": ["magnitude", "wanda", "sparsegpt"], "sparsity": 0.5}
GRANULARITIES = ["matrix", "subblock", "block", "window:2"]


@dataclass
class Cluster:
    """Three hosts and a laptop. hosts: by address, those that have power;  storage: a folder that all see"""

    laptop: Machine
    hosts: dict[str, Machine]
    file: Path
    storage: Path

    def exec(self, command: str) -> Ended:
        return self.laptop.run("ray", "exec", self.file, command, timeout=400)

    def up(self, others: list[str]) -> None:
        """`ray up` from the laptop for these workers; returns when all have joined."""
        self.file.write_text(_filled_in(self.laptop, others, self.storage))
        said = self.laptop.run("ray", "up", "-y", self.file, timeout=400)
        assert said.returncode == 0, said.stdout
        wait_until(lambda: self.nodes() == 1 + len(others), "all hosts are nodes", 300)

    def nodes(self) -> int:
        said = self.exec("ray status").stdout
        return int(found[1]) if (found := re.search(r"Active:\s+(\d+) local", said)) else 0

    def space(self, name: str, epochs: int, model: Path, text: Path) -> SearchSpace:
        """Twenty trials over three shards, also in the laptop's and the head's homes."""
        sweep = [
            {"recovery": "none", "criterion": MASKS["criterion"], "sparsity": [0.5, 0.6]},
            {"recovery": "reconstruct", "granularity": GRANULARITIES, "learning_rate": 0.01, "epochs": epochs}
            | MASKS,
            {
                "recovery": "reconstruct",
                "criterion": "wanda",
                "sparsity": 0.6,
                "granularity": "block",
                "learning_rate": 0.01,
            },
        ]
        document = {
            "name": name,
            "model": {"path": str(model), "dtype": "float32"},
            "calibration": {"dataset": str(text), "num_samples": 6, "sequence_length": 32},
            "validation": {"samples": 3},
            "evaluation": {
                "perplexity": [
                    {"name": "test", "dataset": str(text), "sequence_length": 32, "max_windows": 6}
                ]
            },
            "sweep": sweep,
            "execution": {"shards": 3},
        }
        for home in (self.laptop.client, self.hosts[HEAD].home):
            (home / f"{name}.yaml").write_text(yaml.safe_dump(document))
        return SearchSpace.from_dict(document)

    def rows(self, name: str) -> int:
        return len(list((self.storage / name / "trials").glob("*.parquet")))

    def launch(self, name: str) -> tuple[str, set[str]]:
        """Runs the sweep on the head; returns what that says, and the hosts on which shards were seen."""
        launched = self.laptop.start("ray", "exec", self.file, f"raysweep launch ~/{name}.yaml")
        seen: set[str] = set()
        with ThreadPoolExecutor(1) as pool:
            heard = pool.submit(
                launched.communicate
            )  # all the time: what nobody reads blocks it after 64 KiB
            while not heard.done():
                seen |= self.with_shards()
                time.sleep(0.2)
        said, _ = heard.result()
        assert launched.returncode == 0, said
        return said, seen

    def with_shards(self) -> set[str]:
        """Hosts on which a shard runs."""
        return {
            address
            for address, host in self.hosts.items()
            if any(re.match(r"ray::.*ShardActor", line) for line in host.processes().values())
        }


def wait_until(holds: Callable[[], Any], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.3)


def _filled_in(laptop: Machine, others: list[str], storage: Path) -> str:
    """cluster.yaml with the marked lines as a user edits them."""
    text = (ROOT / "cluster.yaml").read_text()
    lines = {
        "cluster_name": laptop.cluster_name,
        "head_ip": HEAD,
        "worker_ips": f"[{', '.join(others)}]",
        "ssh_user": "root",
        "ssh_private_key": laptop.folder.parent / "key",
    }
    for name, value in lines.items():
        text, count = re.subn(rf"(?m)^(\s*{name}:) .*?(?=\s+#)", rf"\1 {value}", text)
        assert count == 1, name
    own = '"$HOME/raysweep-results"'
    assert text.count(own) == 1
    return text.replace(own, f'"{storage}"')


@pytest.fixture(scope="module")
def power(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Machine]]:
    """Starts machines by their addresses; all end with the module."""
    folder = tmp_path_factory.mktemp("hosts")
    with ExitStack() as running:
        wires = running.enter_context(network())
        make_key(folder / "key")
        yield lambda address: running.enter_context(
            started(folder / f"host{address.rpartition('.')[2]}", folder / "key", address, wires)
        )


@pytest.fixture(scope="module")
def cluster(power: Callable[[str], Machine], tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    laptop = power(LAPTOP)
    hosts = {address: power(address) for address in (HEAD, *OTHERS)}
    cluster = Cluster(laptop, hosts, laptop.folder / "cluster.yaml", tmp_path_factory.mktemp("shared"))
    laptop.run("ray", "get-auth-token", "--generate")
    cluster.up(OTHERS)
    return cluster


@pytest.fixture
def same_as_here(cluster: Cluster, tmp_path: Path) -> Callable[[SearchSpace], None]:
    """Checks that a sweep of the cluster has all rows, with the numbers that this process finds by itself."""

    def check(space: SearchSpace) -> None:
        rows = load_results(cluster.storage / space.name)
        assert len(rows) == 20
        assert set(rows.status) == {"finished"}
        launch(space, storage=tmp_path, in_process=True)
        assert_same_numbers(cluster.storage / space.name, tmp_path / space.name)

    return check


def test_a_sweep_runs_on_all_hosts(cluster, same_as_here, tiny_llama, tiny_text):
    space = cluster.space("first", 10, tiny_llama, tiny_text)
    said, seen = cluster.launch("first")
    assert "Joining the Ray cluster" in said
    assert seen == {HEAD, *OTHERS}
    status = cluster.exec("raysweep status first --json").stdout
    state = json.loads(status[status.index("{") : status.rindex("}") + 1])
    assert (state["state"], state["finished"], state["shards"]) == ("finished", 20, 3)
    same_as_here(space)


def test_a_host_that_loses_power_costs_no_trial(cluster, same_as_here, tiny_llama, tiny_text):
    space = cluster.space("robbed", 150, tiny_llama, tiny_text)
    launched = cluster.laptop.start("ray", "exec", cluster.file, "raysweep launch ~/robbed.yaml")
    wait_until(lambda: cluster.rows("robbed") >= 8 or launched.poll() is not None, "rows", 200)
    assert launched.poll() is None
    cluster.hosts.pop(OTHERS[1]).lose_power()
    said, _ = launched.communicate(timeout=500)
    assert launched.returncode == 0, said
    assert "Going on with new shards" in said
    same_as_here(space)


def test_a_host_that_is_added_is_used(cluster, power, same_as_here, tiny_llama, tiny_text):
    cluster.hosts[ADDED] = power(ADDED)
    cluster.up([OTHERS[0], ADDED])
    space = cluster.space("joined", 10, tiny_llama, tiny_text)
    _, seen = cluster.launch("joined")
    assert seen == {HEAD, OTHERS[0], ADDED}
    same_as_here(space)


def test_a_laptop_submits_watches_and_stops(cluster, same_as_here, tiny_llama, tiny_text):
    tunnel = cluster.laptop.start("ray", "dashboard", cluster.file)

    def raysweep(*command: str) -> Ended:
        return cluster.laptop.run(
            "python", "-m", "raysweep", *command, "--address", "http://localhost:8265", RAY_AUTH_MODE="token"
        )

    def state(name: str) -> str | None:
        said = raysweep("status", name, "--json")
        return json.loads(said.stdout)["state"] if said.returncode == 0 else None

    def submit(name: str) -> Any:
        space = cluster.laptop.client / f"{name}.yaml"
        command = ["python", "-m", "raysweep", "launch", space, "--address", "http://localhost:8265"]
        return cluster.laptop.start(*command, RAY_AUTH_MODE="token")

    try:
        wait_until(lambda: raysweep("status").returncode == 0, "the dashboard is within reach", 60)
        space = cluster.space("sent", 150, tiny_llama, tiny_text)
        client = submit("sent")
        wait_until(lambda: state("sent") == "running", "the sweep runs", 200)
        kill(client)
        wait_until(lambda: state("sent") == "finished", "the sweep has finished without its client", 200)
        same_as_here(space)
        cluster.space("ended", 400, tiny_llama, tiny_text)
        client = submit("ended")
        wait_until(lambda: state("ended") == "running", "the sweep runs", 200)
        assert "has ended" in raysweep("stop", "ended").stdout
        said, _ = client.communicate(timeout=60)
        assert client.returncode != 0, said
        assert state("ended") == "interrupted"
    finally:
        kill(tunnel)


def test_down_leaves_nothing(cluster):
    down = cluster.laptop.run("ray", "down", "-y", cluster.file)
    assert down.returncode == 0, down.stdout
    for host in cluster.hosts.values():
        wait_until(lambda host=host: host.ray_processes() == {}, f"{host.address} has no Ray process", 240)
