"""cluster.yaml: what Ray's schema and we ask of it, and once for real: up, launch, dashboard, down over ssh."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests.cluster.machine import ROOT, Machine, started

CLUSTER_YAML = ROOT / "cluster.yaml"

SPACE = """
name: tiny
model: {{path: {model}}}
calibration: {{dataset: {text}/train.parquet, num_samples: 4, sequence_length: 32}}
validation: {{samples: 2}}
evaluation: {{perplexity: [{{name: test, dataset: {text}/test.parquet, sequence_length: 32, max_windows: 3}}]}}
sweep: [{{recovery: none, criterion: [magnitude, wanda], sparsity: 0.5}}]
"""

ASK_DASHBOARD = """
import pathlib, urllib.error, urllib.request
token = (pathlib.Path.home() / ".ray/auth_token").read_text()
for headers in ({}, {"Authorization": "Bearer " + token}):
    request = urllib.request.Request("http://127.0.0.1:8265/api/version", headers=headers)
    try:
        print(urllib.request.urlopen(request, timeout=30).status)
    except urllib.error.HTTPError as error:
        print(error.code)
"""


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CLUSTER_YAML.read_text())
    return loaded


def commands(config: dict[str, Any], machine: str) -> str:
    return "\n".join(config[f"{machine}_start_ray_commands"])


CLUSTERS = [CLUSTER_YAML, ROOT / "clusters" / "aws.yaml", ROOT / "clusters" / "gcp.yaml"]


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.stem)
def test_ray_accepts_it(file: Path) -> None:
    """By the functions that `ray up` calls before it does anything; they raise or exit on what they do not know."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(file.read_text())
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="unknown_key"):
        validate_config(prepare_config({**config, "unknown_key": 1}))


@pytest.mark.parametrize("file", CLUSTERS[1:], ids=lambda file: file.stem)
def test_clouds_get_what_own_machines_get(config: dict[str, Any], file: Path) -> None:
    cloud = yaml.safe_load(file.read_text())
    assert cloud["file_mounts"] == config["file_mounts"]
    profile = next(command for command in cloud["setup_commands"] if "profile.sh <<" in command)
    assert "export RAY_AUTH_MODE=token" in profile
    assert "--dashboard-host=127.0.0.1" in commands(cloud, "head")
    assert "NOT RUN" in file.read_text()
    assert cloud["available_node_types"]["gpu"]["min_workers"] > 0  # a launch plans for nodes that are there


# Fields of KubeRay's types RayJobSpec, RayClusterSpec, HeadGroupSpec, WorkerGroupSpec (ray.io/v1, API reference of 1.6)
JOB = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD = {"rayStartParams", "template"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", *HEAD}


def test_kuberay_gets_a_job_of_this_version() -> None:
    import ray

    manifest = yaml.safe_load((ROOT / "clusters" / "kuberay.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    job, cluster = manifest["spec"], manifest["spec"]["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert (set(job), set(cluster), set(head), set(workers)) == (JOB, CLUSTER, HEAD, WORKERS)
    assert job["entrypoint"].startswith("raysweep launch")
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"]
    for group in (head, workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == head["template"]["spec"]["containers"][0]["image"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            each["name"] for each in pod["volumes"]
        }
        (storage,) = [each["value"] for each in container["env"] if each["name"] == "RAYSWEEP_STORAGE"]
        assert storage == container["volumeMounts"][0]["mountPath"]


def test_no_path_of_one_machine() -> None:
    """Every path is relative to the checkout, or to whoever's home."""
    paths = re.findall(r"(?<![\w.~}\]])/\w[\w./-]*", CLUSTER_YAML.read_text())
    assert set(paths) == {"/dev/null"}


def test_what_is_sent_is_enough_to_install(config: dict[str, Any]) -> None:
    import tomllib

    sent = set(config["file_mounts"].values())
    in_checkout = sent - {"~/.ray/auth_token"}
    assert all((ROOT / path).exists() for path in in_checkout)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {
        project["project"]["readme"],
        *project["project"]["license-files"],
        "Makefile",
        "constraints.txt",
    }
    build = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*needed, "pyproject.toml", *build["packages"], *build["force-include"]} <= sent


def test_settings_that_matter(config: dict[str, Any]) -> None:
    profile = next(command for command in config["setup_commands"] if "profile.sh <<" in command)
    assert "export RAY_AUTH_MODE=token" in profile
    assert "export RAYSWEEP_STORAGE=" in profile
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in commands(config, "head")
    for machine in ("head", "worker"):
        start = next(line for line in config[f"{machine}_start_ray_commands"] if "ray start" in line)
        assert "RAY_enable_autoscaler_v2=0" in start.split("ray start")[0]
        assert commands(config, machine).startswith("ray stop\n")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with started(tmp_path) as machine:
        yield machine


def _filled_in(machine: Machine) -> Path:
    """cluster.yaml with the marked lines as a user edits them."""
    text = CLUSTER_YAML.read_text()
    lines: Sequence[tuple[str, object]] = (
        ("cluster_name", machine.cluster_name),
        ("head_ip", "127.0.0.1"),
        ("worker_ips", "[]"),
        ("ssh_user", getpass.getuser()),
        ("ssh_private_key", machine.folder / "key"),
    )
    for name, value in lines:
        text, count = re.subn(rf"(?m)^(\s*{name}:) .*?(?=\s+#)", rf"\1 {value}", text)
        assert count == 1, name
    (machine.folder / "cluster.yaml").write_text(text)
    return machine.folder / "cluster.yaml"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_up_launch_down(machine: Machine, tiny_llama: Path, tiny_text: Path) -> None:
    cluster = _filled_in(machine)
    (machine.client / "space.yaml").write_text(SPACE.format(model=tiny_llama, text=tiny_text))
    machine.run("ray", "get-auth-token", "--generate")

    up = machine.run("ray", "up", "-y", cluster)
    assert up.returncode == 0, up.stdout
    core = machine.core()
    assert len(core) == 2, machine.processes()
    token = machine.home / ".ray/auth_token"
    assert token.read_text() == (machine.client / ".ray/auth_token").read_text()
    assert token.stat().st_mode & 0o077 == 0
    dashboard = machine.run("python", "-c", ASK_DASHBOARD)
    assert dashboard.stdout.split() == ["401", "200"], dashboard.stdout

    send = machine.run("ray", "rsync-up", cluster, machine.client / "space.yaml", "~/space.yaml")
    assert send.returncode == 0, send.stdout
    launched = machine.run("ray", "exec", cluster, "python -m raysweep launch ~/space.yaml")
    assert launched.returncode == 0, launched.stdout
    rows = pd.read_parquet(machine.home / "raysweep-results/tiny/trials")
    assert sorted(rows["criterion"].fillna("dense")) == ["dense", "magnitude", "wanda"]
    assert set(rows["status"]) == {"finished"}
    assert machine.core() == core, "launch joined the cluster and left it running"
    assert len(list((machine.folder / "ray").glob("session_2*"))) == 1, "launch started no cluster of its own"

    assert len(machine.ray_processes()) > len(core)
    down = machine.run("ray", "down", "-y", cluster)
    assert down.returncode == 0, down.stdout
    assert machine.ray_processes() == {}
