"""`raysweep status` tells of every sweep what its launch last said and what lies there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from raysweep.config.space import SearchSpace
from raysweep.results.folders import SPACE_FILE
from raysweep.results.lock import launch_lock
from raysweep.results.state import ShardState, SweepState
from tests.analysis.rows import failed, row, write_sweep


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_an_empty_storage_is_no_error(raysweep):
    ran = raysweep("status")
    assert ran.status == 0
    assert "raysweep launch" in ran.err
    assert raysweep("status", "--json").json == []


def test_sweeps_are_shown_with_their_counts(raysweep, here, dead_pid):
    storage = here / "raysweep-results"
    for name, state in (("one", "running"), ("two", "finished"), ("three", "failed")):
        folder = write_sweep(storage / name, [row(0), row(1), failed(2, "lost")])
        SweepState(name, state, planned=5, shards=2, dashboard="http://127.0.0.1:8265").write(folder)
    gone = write_sweep(storage / "four", [row(0)])
    SweepState("four", "running", pid=dead_pid, planned=5).write(gone)
    write_sweep(storage / "five", [row(0)])
    ran = raysweep("status")
    lines = {line.split()[0]: line.split() for line in ran.out.splitlines() if line.strip()}
    assert lines["one"][1:7] == ["running", "2", "of", "5", "1", "2"]
    assert lines["two"][1] == "finished"
    assert lines["three"][1] == "failed"
    assert lines["four"][1:5] == ["interrupted", "1", "of", "5"]
    assert lines["five"][1:3] == ["unknown", "1"]
    assert ran.out.count("http://127.0.0.1:8265") == 1
    documents = {one["name"]: one for one in raysweep("status", "--json").json}
    assert {name: one["state"] for name, one in documents.items()} == {
        "one": "running",
        "two": "finished",
        "three": "failed",
        "four": "interrupted",
        "five": None,
    }


def test_one_sweep_by_its_name_or_folder(raysweep, here):
    folder = write_sweep(here / "raysweep-results" / "one", [row(0)])
    SweepState("one", planned=5, pid=os.getpid()).write(folder)
    for way in ("one", str(folder)):
        document = raysweep("status", way, "--json").json
        assert (document["name"], document["finished"], document["planned"]) == ("one", 1, 5)


def test_the_time_left_follows_from_the_rows_of_the_running_launch(raysweep, here):
    """Two alike trials took 10 s each, one after another; six are left."""
    space = SearchSpace.from_dict(
        {
            "name": "one",
            "model": {"path": "builtin:pystdlib"},
            "calibration": {"dataset": "builtin:pystdlib"},
            "sweep": [{"recovery": "none", "criterion": "wanda", "sparsity": [n / 10 for n in range(1, 9)]}],
        }
    )
    now = datetime.now(UTC)
    moments = [now - timedelta(seconds=ago) for ago in (21, 20, 10)]
    rows = [row(0, "dense", seconds_total=1.0)]
    rows += [row(n, "none", sparsity=n / 10, seconds_total=10.0) for n in (1, 2)]
    folder = write_sweep(
        here / "raysweep-results" / "one",
        [one | {"started_at": at} for one, at in zip(rows, moments, strict=True)],
    )
    (folder / SPACE_FILE).write_text(json.dumps(space.to_dict()))
    state = SweepState("one", planned=9, started_at=(now - timedelta(seconds=30)).isoformat())
    state.write(folder)
    assert raysweep("status", "one", "--json").json["seconds_left"] == pytest.approx(60, rel=0.2)
    replace(state, state="finished").write(folder)
    assert raysweep("status", "one", "--json").json["seconds_left"] is None


def test_a_running_sweep_shows_what_its_shards_do_and_the_best_so_far(raysweep, here):
    rows = [row(0, "dense"), row(1, "none", sparsity=0.5, perplexity=9.5), row(2, "none", sparsity=0.6)]
    folder = write_sweep(here / "raysweep-results" / "one", rows)
    space = {
        "name": "one",
        "model": {"path": "builtin:pystdlib"},
        "calibration": {"dataset": "builtin:pystdlib"},
        "sweep": [{"recovery": "none", "criterion": "wanda", "sparsity": [0.5, 0.6, 0.7]}],
    }
    (folder / SPACE_FILE).write_text(json.dumps(SearchSpace.from_dict(space).to_dict()))
    works = ShardState(7, 3 << 20, "wanda 0.7: recover 0.attention", 0.934, 0.25, 12_345.0, 800.0)
    state = SweepState("one", planned=4, shards=2, activity=(works, ShardState(0, 0, "")))
    state.write(folder)
    shown = raysweep("status", "one").out
    lines = [line.split() for line in shown.splitlines()]
    assert [
        "0",
        "93%",
        "15.0",
        "12.3",
        "K",
        "800",
        "3.0",
        "MiB",
        "wanda",
        "0.7:",
        "recover",
        "0.attention",
    ] in lines
    assert ["1", "0", "B", "waits"] in lines
    assert "best so far" in shown
    assert "9.50" in shown
    assert "best so far" not in raysweep("status").out
    assert raysweep("status", "one", "--json").json["activity"][0]["busy"] == 0.934
    replace(state, state="finished").write(folder)
    assert "waits" not in raysweep("status", "one").out


def test_rows_of_other_trials_are_no_part_of_the_progress(here, raysweep):
    folder = write_sweep(
        here / "raysweep-results" / "one", [row(n, "none", sparsity=n / 10) for n in range(5)]
    )
    SweepState("one", planned=9, others=3, state="finished").write(folder)
    document = raysweep("status", "one", "--json").json
    assert (document["planned"], document["finished"], document["others"]) == (9, 2, 3)


def test_a_sweep_that_starts_is_told(raysweep, here):
    """A launch holds it before it has written anything."""
    folder = here / "raysweep-results" / "one"
    folder.mkdir(parents=True)
    with launch_lock(folder):
        (document,) = raysweep("status", "--json").json
        assert (document["name"], document["state"], document["pid"]) == ("one", "starting", os.getpid())
        assert "starting" in raysweep("status").out
    assert raysweep("status", "--json").json == []
