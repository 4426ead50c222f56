"""`raysweep launch` without Ray: table or JSON on stdout, progress on stderr, the status of every ending."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from raysweep.results.lock import launch_lock
from raysweep.results.reader import load_results

ROOT = Path(__file__).resolve().parents[2]


def test_a_sweep_from_beginning_to_end(raysweep, space_file, here):
    ran = raysweep("launch", space_file, "--in-process")
    assert ran.status == 0, ran.err
    rows = load_results("small")
    assert set(rows["status"]) == {"finished"}
    for value in rows["perplexity"]:
        assert f"{value:.2f}" in ran.out
        assert f"perplexity {value:.2f}" in ran.err
    assert "[1/4] dense" in ran.err
    *_, reality, last = ran.err.splitlines()
    assert re.fullmatch(
        r"took [\d.]+ s; the process held up to [\d.]+ [MG]iB \(planned [\d.]+ [MG]iB\)", reality
    )
    assert (
        last == '4 rows in raysweep-results/small; in pandas: raysweep.load_results("raysweep-results/small")'
    )


def test_the_time_is_compared_with_a_plan_that_measured_the_device(raysweep, space_file, here):
    planned = raysweep("plan", space_file, "--json").json["seconds_in_process"]
    reality = raysweep("launch", space_file, "--in-process").err.splitlines()[-2]
    assert f"(planned {planned:.1f} s)" in reality
    stored = json.loads((here / "raysweep-results" / "small" / "plan.json").read_text())
    assert stored["planned_seconds"] == planned
    again = raysweep("launch", space_file, "--in-process").err
    assert "took" not in again  # nothing ran


def test_a_continued_sweep_runs_only_what_is_new(raysweep, space_file, here):
    raysweep("launch", space_file, "--in-process")
    first = load_results("small").set_index("trial_id")["started_at"]
    more = ("--set", "sweep.0.sparsity=[0.5, 0.6]", "--json", "--trace")
    ran = raysweep("launch", space_file, "--in-process", *more)
    assert ran.status == 0
    assert "trace in raysweep-results/small/trace.json" in ran.err
    assert (here / "raysweep-results" / "small" / "trace.json").exists()
    assert "6 trials, 4 finished before" in ran.err
    assert (ran.json["sweep"], len(ran.json["rows"])) == ("small", 6)
    second = load_results("small").set_index("trial_id")["started_at"]
    assert second[first.index].equals(first)
    again = raysweep("launch", space_file, "--in-process", "--trace")
    assert again.status == 0
    assert "[" not in again.err
    assert "--trace: nothing was left to run" in again.err


def test_a_failed_trial_makes_the_status_1_and_is_listed(raysweep, space_file):
    ran = raysweep("launch", space_file, "--in-process", "--set", "sweep.1.learning_rate=[1e30, 0.01]")
    assert ran.status == 1
    assert "Failed: 1" in ran.out
    assert "wanda/row 0.5 subblock lr=1e+30" in ran.out
    assert "failed: " in ran.err
    assert "Traceback" not in ran.err


def test_name_and_storage(raysweep, space_file, here):
    ran = raysweep("launch", space_file, "--in-process", "--name", "other", "--storage", "there", "--json")
    assert ran.json["folder"] == str(here / "there" / "other")
    assert len(load_results(here / "there" / "other")) == 4


def test_clean_leaves_rows_and_nothing_that_is_none(raysweep, space_file, here):
    raysweep("launch", space_file, "--in-process")
    folder = here / "raysweep-results" / "small"
    before = load_results(folder)
    kept = {path.name for path in folder.iterdir()}
    for name in ("tune", "retraining"):
        (folder / name / "deep").mkdir(parents=True)
        (folder / name / "deep" / "file").write_bytes(b"x" * 5000)
    with launch_lock(folder):
        refused = raysweep("clean", "small")
    assert refused.status == 2
    assert "running already" in refused.err
    assert (folder / "tune").exists()
    cleaned = raysweep("clean", "small")
    assert cleaned.status == 0, cleaned.err
    assert "KB removed; 8 files of finished trials became two; 4 rows kept in" in cleaned.err
    assert [path.name for path in (folder / "trials").iterdir()] == ["0-compacted.parquet"]
    assert {path.name for path in folder.iterdir()} == kept
    pd.testing.assert_frame_equal(load_results(folder), before)
    again = raysweep("launch", space_file, "--in-process", "--json")  # all of it has its rows
    assert again.status == 0, again.err
    assert "4 finished before" in again.err
    pd.testing.assert_frame_equal(load_results(folder), before)
    more = raysweep("launch", space_file, "--in-process", "--json", "--set", "sweep.0.sparsity=[0.5, 0.6]")
    assert len(more.json["rows"]) == 6
    assert "4 finished before" in more.err
    assert raysweep("status", "small", "--json").json["finished"] == 6


def in_the_middle_of_many(space_file: Path, storage: Path) -> subprocess.Popen[str]:
    """A launch of ninety trials, of which three are done."""
    many = "[" + ", ".join(str(n / 100) for n in range(1, 90)) + "]"
    command = [sys.executable, "-m", "raysweep", "launch", str(space_file), "--in-process", "--set"]
    process = subprocess.Popen(
        [*command, f"sweep.0.sparsity={many}", "--storage", str(storage)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    next(line for line in process.stderr if line.startswith("[  3/"))
    return process


def test_another_shell_can_stop_a_sweep(raysweep, space_file, here):
    assert raysweep("stop", "small", "--storage", str(here)).status == 2, "there is none yet"
    process = in_the_middle_of_many(space_file, here)
    refused = raysweep("launch", space_file, "--in-process", "--storage", str(here))
    assert refused.status == 2
    assert f"as process {process.pid} on" in refused.err
    stopped = raysweep("stop", "small", "--storage", str(here))
    assert stopped.status == 0, stopped.err
    process.communicate(timeout=60)
    assert process.returncode == 130
    kept = len(load_results(here / "small"))
    assert 3 <= kept < 90
    assert f"small, process {process.pid} on" in stopped.err
    assert f"{kept} rows kept" in stopped.err
    assert raysweep("status", "small", "--storage", str(here), "--json").json["state"] == "interrupted"
    assert not [*here.rglob("*.lock"), *here.rglob("*.request"), *here.rglob("*.tmp")]
    again = raysweep("stop", "small", "--storage", str(here))
    assert again.status == 2
    assert "not running" in again.err


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_a_signal_keeps_finished_rows_and_the_same_command_continues(space_file, here, number, status):
    process = in_the_middle_of_many(space_file, here)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert out == ""
    assert "Traceback" not in err
    kept = load_results(here / "small")
    assert 3 <= len(kept) < 90
    assert f"interrupted: {len(kept)} rows kept in {here / 'small'}; the same command continues" in err
    assert not list(here.rglob("*.tmp"))
