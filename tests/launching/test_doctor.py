"""raysweep doctor: faults are planted for real, on this machine and on a node of a cluster with mounts of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from raysweep.cluster import connect, everywhere
from raysweep.cluster.everywhere import Answer
from raysweep.config.space import SearchSpace
from raysweep.launching import doctor
from raysweep.launching.doctor import Finding, look_over
from raysweep.launching.examination import PORTS, clock, examine
from tests.cluster.nodes import head_environment, node, skip_without_namespaces, wait_for

MIB = 1 << 20
CHECKS = ["cluster", "search space", "plan", "versions", "model", "storage", "temporary files"]
CHECKS += ["shared memory", "memory", "devices"]


def findings(space: SearchSpace, storage: Path, address: str | None = "local") -> list[Finding]:
    found: list[Finding] = []
    look_over(space, str(storage), address, found.append)
    return found


def faults(found: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in found if finding.is_fault}


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A file system of its own of so many bytes; skips where that cannot be had."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_nothing_is_wrong_here_and_nothing_is_left(make_space, tmp_path):
    found = findings(make_space(), tmp_path / "a" / "b")
    assert [finding.check for finding in found] == CHECKS
    assert not faults(found)
    assert not (tmp_path / "a").exists()


def test_a_taken_port_is_told(make_space, tmp_path, monkeypatch):
    monkeypatch.setattr(connect, "running_address", lambda address: None)
    with socket.socket() as taken:
        try:
            taken.bind(("", PORTS[0]))
        except OSError:
            pytest.skip(f"{PORTS[0]} is taken anyway")
        taken.listen()
        told = [one for one in findings(make_space(), tmp_path, address=None) if one.check == "ports"]
    (fault,) = [one for one in told if f"listens on {PORTS[0]}," in one.said]
    assert "--port" in str(fault.mend)


def test_a_full_disk_is_told(make_space, tmp_path):
    with mounted(tmp_path, MIB):
        with suppress(OSError), open(tmp_path / "filler", "wb", buffering=0) as stream:
            while True:
                stream.write(bytes(512))
        fault = faults(findings(make_space(), tmp_path))["storage"]
    assert "No space left on device" in fault.said
    assert "--storage" in str(fault.mend)


def test_a_nearly_full_disk_is_told(make_space, tmp_path):
    with mounted(tmp_path, 16 * MIB):
        fault = faults(findings(make_space(), tmp_path))["storage"]
    assert "16.0 MiB are free" in fault.said


def test_a_scratch_folder_with_too_little_room_is_told(make_space, tmp_path):
    (scratch := tmp_path / "scratch").mkdir()
    stores = {"weight_store": "disk", "activation_store": "disk", "scratch": str(scratch)}
    with mounted(scratch, 16 * MIB):
        found = findings(make_space(execution=stores), tmp_path)
        assert [one.said for one in found if one.check == "scratch"] == [f"{scratch}, 16.0 MiB free"]
    with mounted(scratch, 64 << 10):
        fault = faults(findings(make_space(execution=stores), tmp_path))["scratch"]
    assert f"64.0 KiB are free in {scratch}, and the sweep needs" in fault.said
    assert "execution.scratch" in str(fault.mend)


def test_a_sweep_that_cannot_fit_is_told(make_space, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "this_node", lambda: doctor.Node(1, 0, 300 * MIB))
    fault = faults(findings(make_space(), tmp_path))["plan"]
    assert "300.0 MiB" in fault.said
    assert "calibration.num_samples" in str(fault.mend)


def test_a_wrong_search_space_does_not_hide_the_rest(make_space, tmp_path):
    found = findings(make_space(model={"path": str(tmp_path / "nowhere")}), tmp_path)
    assert list(faults(found)) == ["search space"]
    assert {"versions", "storage", "shared memory", "memory"} <= {finding.check for finding in found}


def test_a_storage_that_cannot_be_reached_does_not_hide_the_rest(make_space, tmp_path):
    (tmp_path / "file").write_text("")
    found = findings(make_space(), tmp_path / "file" / "storage")
    assert list(faults(found)) == ["storage"]
    assert {"search space", "versions", "model", "memory"} <= {finding.check for finding in found}


def test_an_address_where_nobody_is(make_space, tmp_path):
    fault = faults(findings(make_space(), tmp_path, "127.0.0.1:9"))["cluster"]
    assert "no Ray cluster answers" in fault.said


def test_what_differs_from_here(make_space, tmp_path, monkeypatch):
    """Of an answer that this machine gives itself, with one thing changed at a time."""
    answer = examine([], None, "marker")
    room = {"total": 1 << 40, "free": 1 << 40}
    healthy = answer | {"memory": room, "shared_memory": room, "temporary": room}

    def asked(function: Any, *_: Any, timeout_s: float) -> list[Answer]:
        value = time.time() + ahead[0] if function is clock else healthy | changed
        return [Answer("other", "1.2.3.4", 0, value)]

    monkeypatch.setattr(doctor, "examine", lambda *_: healthy)
    monkeypatch.setattr(everywhere, "ask_every_node", asked)
    ahead, changed = [0.0], dict[str, Any]()

    def told(check: str, **changes: Any) -> Finding | None:
        found: list[Finding] = []
        changed.clear()
        changed.update(changes)
        one = doctor._Doctor(make_space(), str(tmp_path), None, found.append)
        one._examine(None, [], [], on_cluster=True)
        assert {finding.about for finding in found} == {"other (1.2.3.4)"}
        assert all(finding.check == check for finding in found if finding.is_fault)
        return faults(found).get(check)

    assert told("none") is None
    assert "torch missing" in told("versions", versions=healthy["versions"] | {"torch": None}).said
    ahead[0] = -5.0
    assert told("clock").said == "5 s behind"
    ahead[0] = 5.0
    assert told("clock").said == "5 s ahead"
    ahead[0] = 1.5
    assert told("clock") is None
    assert "64.0 MiB" in told("shared memory", shared_memory={"total": 64 * MIB, "free": 0}).said
    assert told("scratch", scratch={"folder": "/scratch", "free": MIB}) is None  # nothing comes there
    assert "1.0 MiB are free" in told("temporary files", temporary={"total": MIB, "free": MIB}).said


# Nodes of a real cluster


@pytest.mark.long
def test_faults_of_a_node_are_told(tmp_path, tiny_llama, make_space):
    """Another version, no model, a storage of its own, little shared memory; then another token."""
    skip_without_namespaces()
    home, stranger = tmp_path / "home", tmp_path / "stranger"
    for place, token in ((home, "a"), (stranger, "b")):
        (place / ".ray").mkdir(parents=True)
        (place / ".ray" / "auth_token").write_text(token * 64)
    model, storage, skewed = tmp_path / "model", tmp_path / "storage", tmp_path / "skewed"
    shutil.copytree(tiny_llama, model)
    storage.mkdir()
    (skewed / "pyarrow-0.1.dist-info").mkdir(parents=True)
    (skewed / "pyarrow-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: pyarrow\nVersion: 0.1\n"
    )
    (tmp_path / "space.yaml").write_text(make_space(model={"path": str(model)}).resolved_yaml())
    with socket.create_server(("", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    port = address.rpartition(":")[2]
    planted = "\n".join(
        f"mount -t tmpfs -o size={size} tmpfs {place}"
        for place, size in ((model, "1m"), (storage, "4g"), ("/dev/shm", "64m"))
    )
    own = ["--head", f"--port={port}", "--include-dashboard=false"]
    with node(tmp_path, home, *own) as head:
        wait_for("Ray runtime started", head)
        with node(
            tmp_path, home, f"--address={address}", mounts=f"hostname planted\n{planted}", path=str(skewed)
        ) as other:
            wait_for("Ray runtime started", other)
            found = json.loads(ran(tmp_path, home, "doctor", address, status=1))
            refused = json.loads(ran(tmp_path, stranger, "doctor", address, status=1))
            unshared = ran(tmp_path, home, "launch", address, status=2)
    there = {one["check"]: one for one in found if one["about"].startswith("planted") and one["mend"]}
    assert set(there) == {"versions", "model", "storage", "shared memory"}
    assert "pyarrow 0.1, here" in there["versions"]["said"]
    assert str(model) in there["model"]["said"]
    assert "not the folder that it is on this machine" in there["storage"]["said"]
    assert "64.0 MiB" in there["shared memory"]["said"]
    elsewhere = [one for one in found if not one["about"].startswith("planted") and one["mend"]]
    assert not elsewhere
    (fault,) = [one for one in refused if one["mend"]]
    assert fault["check"] == "token"
    assert "auth_token" in fault["mend"]
    assert "not the same folder on all nodes; planted" in unshared
    assert not list(storage.iterdir())


def ran(folder: Path, home: Path, command: str, address: str, status: int) -> str:
    """What the command says: on stdout, or where it has refused, on stderr."""
    line = [sys.executable, "-m", "raysweep", command, str(folder / "space.yaml"), "--json"]
    line += ["--storage", str(folder / "storage"), "--address", address]
    done = subprocess.run(line, env=head_environment(home), capture_output=True, text=True, timeout=200)
    assert done.returncode == status, done.stderr
    return done.stderr if status == 2 else done.stdout
