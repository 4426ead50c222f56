"""Sweeps submitted to a real cluster from a machine outside of it: they outlive who submits them, and can be watched
and ended from there, also in Ray's dashboard."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raysweep.launching.launch import launch
from tests.browser import EXECUTABLE, Browser, browser
from tests.cluster.nodes import head_environment, node, skip_without_namespaces, wait_for
from tests.frames import assert_same_numbers

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

OWN = "def scores(weight, statistics):\n    return weight.abs() * statistics.gram_II.diagonal()\n"
SWEEP = [
    {"recovery": "none", "criterion": ["magnitude", "wanda"], "sparsity": 0.5},
    {
        "recovery": "reconstruct",
        "criterion": ["wanda", "own_scores:scores"],
        "sparsity": 0.5,
        "granularity": ["subblock", "block"],
        "learning_rate": 0.01,
        "epochs": 200,
    },
]


@dataclass(frozen=True)
class Outside:
    """A machine that knows no more of the cluster than its dashboard and its token."""

    folder: Path
    home: Path
    address: str

    def start(self, *command: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "raysweep", *command, "--address", self.address]
        return subprocess.Popen(
            line,
            cwd=self.folder,
            env=head_environment(self.home),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def says(self, *command: str, status: int = 0) -> str:
        process = self.start(*command)
        words, _ = process.communicate(timeout=200)
        assert process.returncode == status, words
        return words

    def state(self) -> dict[str, Any]:
        (document,) = json.loads(self.says("status", "--json"))
        return document


@pytest.fixture
def outside(tmp_path, monkeypatch) -> Iterator[Outside]:
    skip_without_namespaces()
    home, folder = tmp_path / "home", tmp_path / "outside"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("a" * 64)
    folder.mkdir()
    (folder / "own_scores.py").write_text(OWN)
    with ExitStack() as free:  # others of Ray may have its own ports on this machine
        taken = [free.enter_context(socket.create_server(("", 0))) for _ in range(3)]
        port, dashboard, agent = [each.getsockname()[1] for each in taken]
    monkeypatch.setenv("RAYSWEEP_STORAGE", str(tmp_path / "results"))
    start = ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    start += [f"--dashboard-agent-listen-port={agent}"]
    with node(tmp_path, home, *start) as head:
        wait_for("Ray runtime started", head)
        monkeypatch.delenv("RAYSWEEP_STORAGE")  # outside, nobody knows where results are
        yield Outside(folder, home, f"http://127.0.0.1:{dashboard}")


def wait_until_running(outside: Outside) -> None:
    deadline = time.monotonic() + 150
    while not (found := json.loads(outside.says("status", "--json"))) or found[0]["state"] != "running":
        assert time.monotonic() < deadline, found


def test_a_sweep_outlives_who_submits_it(outside, make_space, tmp_path, monkeypatch):
    monkeypatch.chdir(outside.folder)
    space = make_space(sweep=SWEEP)
    (outside.folder / "space.yaml").write_text(space.resolved_yaml())
    client = outside.start("launch", "space.yaml")
    wait_until_running(outside)
    client.kill()
    said, _ = client.communicate()
    assert "with or without this process" in said
    deadline = time.monotonic() + 200
    while (state := outside.state())["state"] == "running":
        assert time.monotonic() < deadline
    assert (state["state"], state["finished"], state["failed"]) == ("finished", 7, 0)
    assert "wanda" in outside.says("results", "tiny")
    launch(space, storage=tmp_path / "here", in_process=True)
    assert_same_numbers(tmp_path / "results" / "tiny", tmp_path / "here" / "tiny")


def test_rows_do_not_lie_in_a_folder_of_the_job(outside, make_space):
    (outside.folder / "space.yaml").write_text(make_space(sweep=SWEEP).resolved_yaml())
    assert "full path" in outside.says("launch", "space.yaml", "--storage", "results", status=2)
    assert "full path" in outside.says("status", "--storage", "results", status=2)


def test_it_can_be_ended_from_there(outside, make_space):
    endless = [SWEEP[0], SWEEP[1] | {"epochs": 10_000}]
    (outside.folder / "space.yaml").write_text(make_space(sweep=endless).resolved_yaml())
    client = outside.start("launch", "space.yaml")
    wait_until_running(outside)
    assert "has ended" in outside.says("stop", "tiny")
    words, _ = client.communicate(timeout=60)
    assert client.returncode != 0
    assert "interrupted" in words
    assert outside.state()["state"] == "interrupted"
    again = outside.start("launch", "space.yaml")
    wait_until_running(outside)
    again.send_signal(signal.SIGINT)  # nobody is there to be asked: it goes on
    words, _ = again.communicate(timeout=30)
    assert again.returncode == 130
    assert "tiny goes on; `raysweep stop tiny --address" in words
    assert outside.state()["state"] == "running"


@pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium on this machine")
def test_the_dashboard_shows_shards_and_trials_by_name(outside, make_space, tmp_path):
    """Shards by their group and number, trials as such, calls by trial and unit."""
    space = make_space(sweep=[SWEEP[0], SWEEP[1] | {"epochs": 10_000}], execution={"shards": 2})
    (outside.folder / "space.yaml").write_text(space.resolved_yaml())
    client = outside.start("launch", "space.yaml")
    wait_until_running(outside)
    with browser(tmp_path / "profile") as page:
        token = (outside.home / ".ray" / "auth_token").read_text()
        page.call("Network.setExtraHTTPHeaders", headers={"Authorization": f"Bearer {token}"})
        page.open(f"{outside.address}/#/actors")
        group = r"raysweep/tiny-[0-9a-f]{4}/[0-9a-f]{4}"
        wait_for_words(page, rf"{group}/0", rf"{group}/1", r"SweepTrial\s+-\s+-\s+ALIVE")
        tasks, deadline = (
            "fetch('/api/v0/tasks?limit=10000').then(answer => answer.text())",
            time.monotonic() + 90,
        )
        call = r'"name": ?"wanda/row 0\.5 (subblock|block) [^"]*: recover [0-3]'
        while not re.search(call, told := page.eval(tasks)):
            assert time.monotonic() < deadline, re.findall(r'"name": ?"[^"]*"', told)
            time.sleep(1)
    assert "has ended" in outside.says("stop", "tiny")
    client.communicate(timeout=60)


def wait_for_words(page: Browser, *patterns: str) -> None:
    """Until the page shows them all."""
    deadline = time.monotonic() + 90
    while not all(re.search(pattern, shown := page.eval("document.body.innerText")) for pattern in patterns):
        assert time.monotonic() < deadline, shown
        time.sleep(1)
