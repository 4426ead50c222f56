"""What cannot work is refused before anything starts: status 2, key and remedy, nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]

# setting, and what the message must name: the key, the value, what is allowed, the nearest name
IN_THE_FILE = {
    "unknown key": (["sweep.0.sparcity=0.5"], ["sparcity", "did you mean 'sparsity'?", "criterion"]),
    "unknown section": (["modle.path=x"], ["modle", "did you mean 'model'?", "calibration"]),
    "unknown key of execution": (
        ["execution.shard=2"],
        ["shard", "did you mean 'shards'?", "threads_per_worker"],
    ),
    "unknown value": (
        ["sweep.0.criterion=wandaa"],
        ["criterion", "wandaa", "did you mean 'wanda'?", "magnitude"],
    ),
    "unknown recovery": (
        ["sweep.0.recovery=reconstrct"],
        ["recovery", "reconstrct", "'reconstruct'", "none"],
    ),
    "sparsity 1": (["sweep.0.sparsity=1"], ["sparsity", "1", "from 0 to below 1"]),
    "negative sparsity": (["sweep.0.sparsity=-0.1"], ["sparsity", "-0.1", "from 0 to below 1"]),
    "N equal to M": (["sweep.0.pattern=4:4"], ["pattern", "4:4", "1 <= N < M"]),
    "N above M": (["sweep.0.pattern=4:2"], ["pattern", "4:2", "1 <= N < M"]),
    "text for a number": (["sweep.0.sparsity=half"], ["sparsity", "half", "a number from 0"]),
    "text for a whole number": (
        ["calibration.num_samples=many"],
        ["num_samples", "many", "a whole number from 1"],
    ),
    "no trial at all": (["sweep=[]"], ["no trial at all", "sweep", "at least one group"]),
    "a setting without a value": (["sweep.0.sparsity"], ["sweep.0.sparsity", "KEY=VALUE"]),
    "a name that is a path": (["name=../x"], ["../x", "name", "letters"]),
}
IN_MODEL_OR_DATA = {
    "M that does not divide the inputs": (
        ["sweep.0={recovery: none, criterion: wanda, pattern: '2:5'}"],
        ["2:5", "pattern", "32"],
    ),
    "missing model": (["model.path=no/such/folder"], ["no/such/folder"]),
    "no such builtin": (["model.path=builtin:pystdlb"], ["--set model.path: ", "'builtin:pystdlib'"]),
    "model without safetensors": (["model.path={bare}"], ["{bare}", "safetensors"]),
    "missing data": (
        ["calibration.dataset=missing.parquet"],
        ["--set calibration.dataset: no such", "missing.parquet"],
    ),
    "empty data": (["calibration.dataset={empty}"], ["--set calibration.dataset: ", "{empty}"]),
    "a split that is not there": (
        ["calibration.dataset=builtin:pystdlib", "calibration.split=nosuch"],
        ["--set calibration.split: ", "nosuch"],
    ),
    "more samples than the data gives": (
        ["calibration.num_samples=1000000"],
        ["1000000", "--set calibration.num_samples: "],
    ),
    "a split for retraining that is not there": (
        [
            "sweep.0={recovery: retrain, criterion: wanda, sparsity: 0.5, learning_rate: 1.0e-4, "
            "data: {dataset: builtin:pystdlib, split: nosuch, sequence_length: 32}}"
        ],
        ["--set sweep.0: sweep[0].data.split: no split 'nosuch'"],
    ),
    "more validation than the data gives": (
        ["validation.samples=1000000"],
        ["1000000", "--set validation.samples: "],
    ),
    "a sequence longer than the model takes": (
        ["calibration.sequence_length=65"],
        ["65", "64", "--set calibration.sequence_length: "],
    ),
    "a window longer than the model takes": (
        ["evaluation.perplexity.0.sequence_length=65"],
        ["65", "64", "--set evaluation.perplexity.0.sequence_length: "],
    ),
    "more shards than blocks": (["execution.shards=5"], ["execution.shards", "5", "1 to 4"]),
}


@pytest.fixture
def places(tiny_llama: Path, tmp_path: Path) -> dict[str, str]:
    """Paths of what is wrong: a model folder without weights, a data file without rows."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tiny_llama / "config.json").read_text())
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    return {"bare": str(bare), "empty": str(tmp_path / "empty.parquet")}


def filled(texts: list[str], places: dict[str, str]) -> list[str]:
    for name, path in places.items():
        texts = [text.replace("{" + name + "}", path) for text in texts]
    return texts


def tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path.relative_to(folder)), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def assert_refused(ran: Any, named: list[str]) -> None:
    assert ran.status == 2, ran.err
    assert ran.out == ""
    assert "error: " in ran.err
    assert "Traceback" not in ran.err
    for part in named:
        assert part in ran.err, f"{part!r} is not in: {ran.err}"


def cases(table: dict[str, tuple[list[str], list[str]]]) -> list[Any]:
    return [pytest.param(*values, id=name.replace(" ", "-")) for name, values in table.items()]


@pytest.mark.parametrize("command", ["launch", "plan"])
@pytest.mark.parametrize(("settings", "named"), cases(IN_THE_FILE))
def test_a_mistake_in_the_space_is_refused(raysweep, tmp_path, space_file, command, settings, named):
    before = tree(tmp_path)
    ran = raysweep(command, space_file, *(word for one in settings for word in ("--set", one)))
    assert_refused(ran, named)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", [["launch", "--in-process"], ["plan"]], ids=lambda words: words[0])
@pytest.mark.parametrize(("settings", "named"), cases(IN_MODEL_OR_DATA))
def test_a_mistake_in_model_or_data_is_refused(
    raysweep, tmp_path, space_file, places, command, settings, named
):
    before = tree(tmp_path)
    ran = raysweep(*command, space_file, *(w for one in filled(settings, places) for w in ("--set", one)))
    assert_refused(ran, filled(named, places))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["launch", "plan"])
def test_a_storage_that_cannot_be_written_is_refused(raysweep, tmp_path, space_file, command):
    (tmp_path / "file").write_text("here lies no folder")
    before = tree(tmp_path)
    for way in (
        ["--storage", tmp_path / "file"],
        ["--set", f"execution.storage={tmp_path / 'file' / 'deeper'}"],
    ):
        assert_refused(raysweep(command, space_file, *way), ["storage", str(tmp_path / "file"), "--storage"])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "~nobody_at_all/x"], ids=["nul", "long", "home"])
def test_a_path_that_can_be_none_is_refused(raysweep, here, space_file, path):
    for command in (
        ["plan", space_file, "--storage", path],
        ["launch", space_file, "--in-process", "--set", f"model.path={json.dumps('./' + path)}"],
        ["plan", path],
        ["results", path],
        ["status", "--storage", path],
        ["clean", "x", "--storage", path],
    ):
        assert_refused(raysweep(*command), [])
    assert tree(here) == []


@pytest.mark.parametrize("width", ["9" * 5000, "²", "0", "-1", "x", ""])
def test_widths_that_are_none_say_nothing(raysweep, monkeypatch, width):
    """rich takes any digits for a number."""
    for name in ("COLUMNS", "LINES"):
        monkeypatch.setenv(name, width)
    assert_refused(raysweep("plan", "nothing"), ["nothing"])
    assert raysweep("pla").status == 2


def test_bytes_of_a_path_that_are_no_text_are_shown(raysweep, space_file):
    ran = raysweep("plan", space_file, "--storage", "a\udcff")
    assert ran.status == 0
    assert "\\udcff" in ran.out


@pytest.mark.parametrize("command", ["launch", "plan"])
def test_a_missing_space_is_refused_with_the_nearest(raysweep, here, command):
    assert_refused(raysweep(command, "quickstrat"), ["quickstrat", "did you mean 'quickstart'?"])
    assert_refused(raysweep(command, "quickstart.yml"), ["quickstart.yml", "did you mean 'quickstart'?"])
    assert tree(here) == []


def test_a_space_that_is_no_yaml_is_refused_with_its_line(raysweep, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("name: a\nmodel: {path: x\ncalibration: [")
    assert_refused(raysweep("launch", path), ["broken.yaml:"])


def test_every_message_names_file_and_line(raysweep, space_file, small_space):
    small_space["sweep"][0]["sparsity"] = 1.5
    space_file.write_text(json.dumps(small_space, indent=1))
    line = 1 + space_file.read_text().split("\n").index('   "sparsity": 1.5')
    assert_refused(raysweep("launch", space_file), [f"{space_file}:{line}: sweep[0].sparsity", "1.5"])


def test_a_wrong_name_is_refused(raysweep, space_file):
    assert_refused(raysweep("launch", space_file, "--name", "a/b"), ["--name", "a/b", "letters"])


def test_results_and_status_refuse_what_is_not_there(raysweep, here):
    assert_refused(raysweep("results"), ["raysweep-results", "raysweep launch"])
    assert_refused(raysweep("results", "x"), ["x"])
    assert_refused(raysweep("status", "x"), ["x"])
    assert tree(here) == []


def test_a_real_process_refuses_before_ray_starts(tmp_path, space_file):
    """The way that users take: the launch that would start Ray, in a process of its own."""
    before = tree(tmp_path)
    command = [sys.executable, "-m", "raysweep", "launch", str(space_file), "--address", "local"]
    run = subprocess.run(
        [*command, "--storage", str(tmp_path / "results"), "--set", "calibration.num_samples=1000000"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert "1000000" in run.stderr
    assert "Traceback" not in run.stderr
    assert "Starting Ray" not in run.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["launch", "plan"])
def test_a_scratch_folder_that_cannot_be_one_is_refused(raysweep, tmp_path, space_file, command):
    (tmp_path / "file").write_text("here lies no folder")
    before = tree(tmp_path)
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        ran = raysweep(command, space_file, "--set", f"execution.scratch={place}")
        assert_refused(ran, ["execution.scratch", str(tmp_path / "file"), "no folder"])
    assert tree(tmp_path) == before
