"""Sweeps into a storage that a URI names: whole, killed, on two machines, stopped from another, and out of reach."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pyarrow.fs
import pytest

from raysweep.config.space import SearchSpace
from raysweep.errors import StorageError, UsageError
from raysweep.launching.launch import launch, refuse_mirror_of_one_node
from raysweep.launching.progress import Silent
from raysweep.launching.stopping import stop
from raysweep.results import lock, mirror, sides
from raysweep.results.cleaning import clean
from raysweep.results.folders import storage_folder, sweep_folder
from raysweep.results.lock import holder_of
from raysweep.results.mirror import lags
from raysweep.results.reader import load_results
from raysweep.results.remote import Remote
from raysweep.results.state import SweepState
from raysweep.results.uris import sweep_uri
from tests.frames import assert_same_numbers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Callable[[str], None]:
    """machine("b"): from now on this is machine b."""

    def become(name: str) -> None:
        monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / f"cache-{name}"))

    become("a")
    return become


@pytest.fixture
def uri(tmp_path) -> str:
    return (tmp_path / "far").as_uri()


def nothing_but_results(uri: str) -> None:
    names = set(Remote(sweep_uri(uri, "tiny")).listing())
    assert {"space.yaml", "status.json"} < names
    assert all(name.startswith(("trials/", "units/")) for name in names - {"space.yaml", "status.json"})


def test_a_sweep_lies_in_its_storage(make_space, tmp_path, machine, uri):
    launch(make_space(), storage=tmp_path / "local", in_process=True)
    rows = launch(make_space(), storage=uri, in_process=True)
    nothing_but_results(uri)
    machine("b")
    pd.testing.assert_frame_equal(load_results("tiny", uri), rows)
    assert_same_numbers(tmp_path / "local" / "tiny", sweep_folder("tiny", uri))
    assert SweepState.read(sweep_folder("tiny", uri)).state == "finished"
    again = launch(make_space(), storage=uri, in_process=True)  # on machine b nothing is left to run
    pd.testing.assert_frame_equal(again, rows)
    assert_same_numbers(tmp_path / "local" / "tiny", tmp_path / "far" / "tiny")  # an ordinary folder


def test_what_was_not_pushed_is_pushed_by_the_next_launch(make_space, tmp_path, machine, uri, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "PAUSES_S", (0.01,))
        write, seen = Remote.write, []

        def failing(self, name, content):
            seen.append(name)
            if name.startswith("trials/") and len(seen) > 8:
                raise StorageError("the storage is gone")
            write(self, name, content)

        patch.setattr(Remote, "write", failing)
        patch.setattr(mirror, "PUSH_EVERY_S", 0.01)
        with pytest.raises(StorageError, match="the storage is gone"):
            launch(make_space(), storage=uri, in_process=True)
    folder = storage_folder(uri) / "tiny"
    kept = load_results(folder)
    assert (kept.status == "finished").all()
    assert lags(folder)
    assert holder_of(folder) is None
    rows = launch(make_space(), storage=uri, in_process=True)
    assert set(kept.started_at) <= set(rows.started_at)  # none of them ran again
    assert not lags(folder)
    machine("b")
    pd.testing.assert_frame_equal(load_results("tiny", uri), rows)


def test_a_whole_sweep_that_was_not_pushed(make_space, machine, uri):
    rows = launch(make_space(), storage=uri, in_process=True)
    folder = storage_folder(uri) / "tiny"
    for name in Remote(sweep_uri(uri, "tiny")).listing():
        Remote(sweep_uri(uri, "tiny")).remove(name)
    (folder / sides.RECORD_FILE).unlink()
    launch(make_space(), storage=uri, in_process=True)
    machine("b")
    pd.testing.assert_frame_equal(load_results("tiny", uri), rows)


def test_an_unreachable_storage_is_refused_before_anything_starts(make_space, machine, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for storage in ("s33://bucket/x", (tmp_path / "file").as_uri()):
        with pytest.raises(UsageError, match="storage"):
            launch(make_space(), storage=storage, in_process=True)


def test_retraining_on_several_nodes_needs_a_mirror_that_they_share(machine, uri, tmp_path, monkeypatch):
    refuse_mirror_of_one_node(storage_folder(uri) / "tiny")  # RAYSWEEP_CACHE says so
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAYSWEEP_CACHE")
    refuse_mirror_of_one_node(tmp_path / "raysweep-results" / "tiny")
    with pytest.raises(UsageError, match="RAYSWEEP_CACHE"):
        refuse_mirror_of_one_node(storage_folder(uri) / "tiny")


LAUNCH = """
import json, sys
from raysweep.config.space import SearchSpace
from raysweep.launching.launch import launch
launch(SearchSpace.from_dict(json.loads(sys.argv[1])), storage=sys.argv[2], in_process=True)
"""


@pytest.fixture
def elsewhere(space_dict, tmp_path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """elsewhere(uri): a launch of many trials on another machine, of which two are there."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(uri: str) -> subprocess.Popen[bytes]:
        space = json.loads(json.dumps(space_dict))
        space["sweep"][0]["sparsity"] = [n / 100 for n in range(1, 90)]
        environment = os.environ | {"RAYSWEEP_CACHE": str(tmp_path / "cache-elsewhere")}
        command = [sys.executable, "-c", LAUNCH, json.dumps(space), uri]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        started.append(process)
        deadline = time.monotonic() + 60
        while sum(name.startswith("trials/") for name in Remote(sweep_uri(uri, "tiny")).listing()) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def stopped_from_another_machine(make_space, elsewhere, uri: str) -> None:
    process = elsewhere(uri)
    folder = sweep_folder("tiny", uri)
    assert holder_of(folder).pid == process.pid
    with pytest.raises(UsageError, match=f"process {process.pid} on {socket.gethostname()}"):
        launch(make_space(), storage=uri, in_process=True)
    assert stop(folder, 60).pid == process.pid
    assert process.wait(30) != 0
    assert SweepState.read(sweep_folder("tiny", uri)).state == "interrupted"
    nothing_but_results(uri)


def killed_elsewhere(make_space, elsewhere, uri: str, monkeypatch) -> None:
    process = elsewhere(uri)
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(
        socket, "gethostname", lambda: "this-machine"
    )  # from which it cannot be seen to be gone
    with pytest.raises(UsageError, match="is running already"):
        launch(make_space(), storage=uri, in_process=True)
    monkeypatch.setattr(lock, "STALE_S", -5.0)
    kept = load_results("tiny", uri)
    rows = launch(make_space(), storage=uri, in_process=True)
    assert set(kept.started_at) <= set(rows.started_at)
    nothing_but_results(uri)


def test_stop_from_another_machine(make_space, machine, uri, elsewhere):
    stopped_from_another_machine(make_space, elsewhere, uri)


def test_the_sweep_of_a_lost_machine_goes_on_elsewhere(make_space, machine, uri, elsewhere, monkeypatch):
    killed_elsewhere(make_space, elsewhere, uri, monkeypatch)


# A real server


def moto_server() -> str | None:
    return os.environ.get("RAYSWEEP_TEST_MOTO") or shutil.which("moto_server")


class Server:
    """moto on a free port of the loopback. It keeps what it has while it lives."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [str(moto_server()), "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @property
    def query(self) -> str:
        return f"?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/moto-api/", timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.2)


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    if moto_server() is None:
        pytest.skip(
            "needs an S3 server: `pip install 'moto[server]'` somewhere and RAYSWEEP_TEST_MOTO=.../moto_server"
        )
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    server = Server()
    try:
        server.wait()
        files, _ = pyarrow.fs.FileSystem.from_uri(f"s3://bucket{server.query}&allow_bucket_creation=true")
        files.create_dir("bucket")
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.mark.long
def test_a_sweep_on_s3(make_space, tmp_path, machine, server, elsewhere, monkeypatch):
    uri = f"s3://bucket/a/prefix{server.query}"
    with pytest.raises(UsageError, match="no bucket 'other'"):
        launch(make_space(), storage=f"s3://other{server.query}", in_process=True)
    launch(make_space(), storage=tmp_path / "local", in_process=True)
    rows = launch(make_space(), storage=uri, in_process=True)
    machine("b")
    assert_same_numbers(tmp_path / "local" / "tiny", sweep_folder("tiny", uri))
    assert clean(sweep_folder("tiny", uri)).files == 2 * len(rows)
    machine("c")
    pd.testing.assert_frame_equal(load_results(f"s3://bucket/a/prefix/tiny{server.query}"), rows)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    pd.testing.assert_frame_equal(load_results("s3://bucket/a/prefix/tiny"), rows)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    stopped_from_another_machine(make_space, elsewhere, f"s3://bucket/stopped{server.query}")
    killed_elsewhere(make_space, elsewhere, f"s3://bucket/killed{server.query}", monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("in_process", [True, False])
def test_a_server_that_goes_away(make_space, machine, server, monkeypatch, in_process):
    """It ends the sweep once it has been away for long enough; the rows are there, and nothing runs twice."""
    monkeypatch.setattr(mirror, "PAUSES_S", (0.1, 0.1))
    options = {"in_process": True} if in_process else {"address": "local"}
    uri, progress, rows = f"s3://bucket/a{server.query}", Silent(), list[str]()

    def row(row) -> None:
        rows.append(row["trial_id"])
        if len(rows) == 2:
            server.process.send_signal(signal.SIGKILL)

    progress.row = row
    space: SearchSpace = make_space()
    with pytest.raises(StorageError, match="cannot be"):
        launch(space, storage=uri, progress=progress, **options)
    kept = load_results(storage_folder(uri) / "tiny")
    assert len(kept) >= 2
    with pytest.raises(UsageError, match="cannot be reached"):
        launch(space, storage=uri, **options)
    assert len(load_results(storage_folder(uri) / "tiny")) == len(kept)
