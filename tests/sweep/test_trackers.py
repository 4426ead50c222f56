"""Experiment trackers, with their real packages: what they show is what the rows say, and they are no danger."""

from __future__ import annotations

import json
import logging
import os
import secrets
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from raysweep.config.sections import TRACKERS
from raysweep.errors import UsageError
from raysweep.launching.launch import launch, prepare_launch
from raysweep.results.cleaning import clean
from raysweep.sweep.halving import TIME, TRIAL
from raysweep.sweep.identified import SweepTrial
from raysweep.sweep.tracker import Tracker
from raysweep.sweep.trackers import KINDS
from tests.frames import assert_same_numbers

MASK = {"criterion": "wanda", "sparsity": 0.5}
FEW = [{"recovery": "reconstruct", **MASK, "granularity": "block", "learning_rate": [1e30, 0.01]}]
"""Of which the first one fails."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a running cluster with two CPUs. Its processes do not see what tests set in the environment."""
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield running.address
    running.shutdown()


@pytest.fixture
def warnings(caplog) -> Any:
    """What was said of trackers."""
    caplog.set_level(logging.WARNING, logger="raysweep.sweep.tracker")
    return lambda: [
        record.getMessage() for record in caplog.records if record.name == "raysweep.sweep.tracker"
    ]


def with_trackers(make_space: Any, *names: str, **changes: Any) -> Any:
    return make_space(execution={"shards": 2, "trackers": list(names)}, **changes)


# TensorBoard


def framed(path: Path) -> Iterator[bytes]:
    """The records of a file of TensorFlow's format: length, its check, bytes, their check."""
    data, place = path.read_bytes(), 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        yield data[place + 12 : place + 12 + length]
        place += 12 + length + 4


def shown_by_tensorboard(run: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, Any]]:
    """Scalars with their steps, and hyperparameters."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    scalars: dict[str, list[tuple[int, float]]] = {}
    fields: dict[str, Any] = {}
    (file,) = run.glob("events.out.tfevents.*")
    for record in framed(file):
        event = Event.FromString(record)
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
            elif value.metadata.plugin_data.content:
                plugin = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                for name, field in plugin.session_start_info.hparams.items():
                    fields[name] = getattr(field, str(field.WhichOneof("kind")))
    return scalars, fields


def test_tensorboard_shows_every_trial_and_no_number_differs(make_space, tmp_path, cluster, warnings):
    launch(make_space(), storage=tmp_path / "twin", in_process=True)
    rows = launch(with_trackers(make_space, "tensorboard"), storage=tmp_path, address=cluster)
    assert_same_numbers(tmp_path / "twin" / "tiny", tmp_path / "tiny")
    runs = list((tmp_path / "tiny" / "tensorboard").iterdir())
    assert len(runs) == len(rows) == 9
    clean(tmp_path / "tiny")
    for run in runs:
        scalars, fields = shown_by_tensorboard(run)
        (row,) = rows[rows.trial_id == fields["trial_id"]].to_dict("records")
        for name in ("perplexity", "perplexity_short", "validation_perplexity", "realized_sparsity"):
            assert scalars[f"ray/tune/{name}"] == [(1, pytest.approx(row[name], rel=1e-6))]
        assert scalars["ray/tune/device_seconds"] == [(1, pytest.approx(row["device_seconds"], rel=1e-6))]
        assert not {"ray/tune/pid", "ray/tune/sparsity", "ray/tune/time_this_iter_s"} & set(scalars)
        assert fields["recovery"] == row["recovery"]
        assert fields["model"] == row["model"]
        if row["recovery"] == "reconstruct":
            assert (
                run.name == f"{row['criterion']}_row_0.5_{row['granularity']}_lr=0.01_{row['trial_id'][:6]}"
            )
            assert fields["learning_rate"] == 0.01
    assert warnings() == []


@pytest.mark.long
def test_of_a_remote_storage_logs_lie_in_the_mirror(make_space, tmp_path, cluster, monkeypatch):
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "mirrors"))
    space = with_trackers(make_space, "tensorboard", sweep=[{"recovery": "none", **MASK}])
    rows = launch(space, storage=f"file://{tmp_path}/storage", address=cluster)
    logs = list(tmp_path.glob("mirrors/*/tiny/tensorboard/*/events*"))
    assert len(logs) == len(rows) == 2
    assert sorted(path.name for path in (tmp_path / "storage" / "tiny").iterdir()) == [
        "space.yaml",
        "status.json",
        "trials",
        "units",
    ]


# MLflow


@pytest.fixture
def offline(monkeypatch) -> None:
    """Nothing reaches a network, and nothing of the user's is seen."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def runs_in(uri: str, experiment: str) -> dict[str, Any]:
    """MLflow's runs by the trial's identity."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return {run.data.params["trial_id"]: run for run in found}


def test_mlflow_has_a_run_for_every_trial(make_space, tmp_path, cluster, offline, warnings):
    mlflow = pytest.importorskip("mlflow")
    space = with_trackers(make_space, "mlflow", sweep=FEW)
    rows = launch(space, storage=tmp_path, address=cluster).set_index("trial_id")
    runs = runs_in(f"sqlite:///{tmp_path}/tiny/mlflow/mlflow.db", "tiny")
    assert set(runs) == set(rows.index)
    assert len(runs) == 3
    for trial_id, run in runs.items():
        row = rows.loc[trial_id]
        assert run.info.status == {"finished": "FINISHED", "failed": "FAILED"}[row.status]
        assert run.data.params["recovery"] == row.recovery
        assert run.data.metrics.get("perplexity") == (row.perplexity if row.status == "finished" else None)
        assert not {"pid", "sparsity", "time_this_iter_s"} & set(run.data.metrics)
    names = {run.info.run_name for run in runs.values()}
    assert names == {"dense", "wanda/row 0.5 block lr=1e+30", "wanda/row 0.5 block lr=0.01"}
    assert warnings() == []
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert not mlflow.is_tracking_uri_set()


def test_mlflow_goes_where_the_user_says(make_space, tmp_path, cluster, offline, monkeypatch):
    pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mine.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    launch(with_trackers(make_space, "mlflow", sweep=FEW), storage=tmp_path, address=cluster)
    assert len(runs_in(uri, "mine")) == 3
    assert not (tmp_path / "tiny" / "mlflow").exists()
    assert os.environ["MLFLOW_TRACKING_URI"] == uri


# Weights and Biases

BLOCK, HEAD = (
    32768,
    7,
)  # bytes of a block of its log, and of what stands before the log and every piece of a record


def logged(path: Path) -> Iterator[Any]:
    """The records of a run that was kept on this machine: a log as LevelDB's, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = path.read_bytes(), HEAD, b""
    while place + HEAD <= len(data):
        if BLOCK - place % BLOCK < HEAD:
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + HEAD : place + HEAD + length]
        place += HEAD + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


def shown_by_wandb(path: Path) -> SimpleNamespace:
    """A run: its name, project and group, and what is known of it by name."""
    shown = SimpleNamespace(name="", project="", group="", config={}, history=[])
    for record in logged(path):
        if record.HasField("run"):
            run = record.run
            shown.name, shown.project, shown.group = run.display_name, run.project, run.run_group
        updates = (*record.run.config.update, *record.config.update)
        shown.config |= {update.key: json.loads(update.value_json) for update in updates}
        if record.HasField("history"):
            items = record.history.item
            shown.history.append({(i.key or i.nested_key[0]): json.loads(i.value_json) for i in items})
    return shown


def test_wandb_has_a_run_for_every_trial(make_space, tmp_path, cluster, offline, warnings):
    pytest.importorskip("wandb")
    space = with_trackers(make_space, "wandb", sweep=FEW)
    rows = launch(space, storage=tmp_path, address=cluster).set_index("trial_id")
    assert warnings() == []
    files = list((tmp_path / "tiny" / "wandb").glob("offline-run-*/*.wandb"))
    runs = [shown_by_wandb(file) for file in files]
    assert {run.name for run in runs} == {
        "dense",
        "wanda/row 0.5 block lr=1e+30",
        "wanda/row 0.5 block lr=0.01",
    }
    assert len(runs) == 3
    for run in runs:
        row = rows.loc[run.config["trial_id"]]
        assert (run.project, run.group) == ("tiny", "tiny")
        assert run.config["recovery"] == row.recovery
        assert run.config["status"] == row.status
        (shown,) = run.history
        assert shown.get("perplexity") == (row.perplexity if row.status == "finished" else None)
        assert not {"pid", "sparsity", "time_this_iter_s"} & set(shown)


def test_wandb_writes_where_the_user_says(tmp_path, offline, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", "mine")
    monkeypatch.setenv("WANDB_PROJECT", "study")
    with KINDS["wandb"].made(tmp_path / "storage" / "tiny", "tiny") as callback:
        callback.setup()
        assert callback.kwargs["dir"] == str(tmp_path / "mine")  # its process is in another folder
        assert (callback.project, callback.group) == ("study", "tiny")


# What is refused


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_refused_before_anything_is_written(make_space, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, KINDS[name].module, None)
    with pytest.raises(UsageError, match=f"tracker '{name}' needs.*\n  pip install {KINDS[name].package}"):
        launch(with_trackers(make_space, name), storage=tmp_path / "storage")
    with pytest.raises(UsageError, match=f"tracker '{name}' needs"):  # by a plan as well
        prepare_launch(with_trackers(make_space, name), tmp_path / "storage" / "tiny", "cpu")
    assert not (tmp_path / "storage").exists()


def test_wandb_without_a_key_is_refused(make_space, tmp_path, monkeypatch, offline):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="API key"):
        launch(with_trackers(make_space, "wandb"), storage=tmp_path / "storage")
    assert not (tmp_path / "storage").exists()


def test_trackers_are_tunes_and_refused_without_it(make_space, tmp_path):
    with pytest.raises(UsageError, match="tensorboard.*--in-process"):
        launch(with_trackers(make_space, "tensorboard"), storage=tmp_path, in_process=True)


def test_unknown_trackers_are_refused(make_space):
    with pytest.raises(UsageError, match="'tensorbord'\n  did you mean 'tensorboard'"):
        with_trackers(make_space, "tensorbord")
    assert with_trackers(make_space, "wandb", "mlflow", "wandb").execution.trackers == ("wandb", "mlflow")


def test_every_tracker_of_the_settings_is_there():
    assert tuple(KINDS) == TRACKERS


# What goes wrong


@pytest.mark.long
def test_a_tracker_that_cannot_write_costs_no_row(make_space, tmp_path, cluster, warnings):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "tensorboard").write_text("no folder")
    rows = launch(with_trackers(make_space, "tensorboard", sweep=FEW), storage=tmp_path, address=cluster)
    assert sorted(rows.status) == ["failed", "finished", "finished"]
    (said,) = warnings()
    assert said.startswith("nothing more is told to tensorboard: ")
    assert "Not a directory" in said


def test_a_server_that_is_not_there_costs_no_row(
    make_space, tmp_path, cluster, offline, warnings, monkeypatch
):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    rows = launch(with_trackers(make_space, "mlflow", sweep=FEW), storage=tmp_path, address=cluster)
    assert sorted(rows.status) == ["failed", "finished", "finished"]
    (said,) = warnings()
    assert "127.0.0.1" in said


@pytest.mark.long
def test_what_fails_in_a_process_of_wandb_is_heard_of(
    make_space, tmp_path, cluster, offline, warnings, monkeypatch
):
    pytest.importorskip("wandb")
    key = secrets.token_hex(20)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    rows = launch(with_trackers(make_space, "wandb", sweep=FEW), storage=tmp_path, address=cluster)
    assert sorted(rows.status) == ["failed", "finished", "finished"]
    (said,) = warnings()
    assert said.startswith("nothing more is told to wandb: ")
    assert "127.0.0.1:9" in said
    logs = [path for path in Path("/tmp/ray/session_latest/logs").rglob("*") if path.is_file()]
    assert logs
    assert [path.name for path in logs if key in path.read_text(errors="replace")] == []


class Recorded:
    """What one of Tune's callbacks would hear, and what it does instead."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.fails_at, self.hangs, self.seconds = "", threading.Event(), 0.0
        self.hangs.set()

    def __getattr__(self, name: str) -> Any:
        def hear(*arguments: Any) -> None:
            self.hangs.wait()
            time.sleep(self.seconds)
            self.heard.append((name, *map(str, arguments)))
            if name == self.fails_at:
                raise OSError(f"no network for {name}")

        return hear

    @contextmanager
    def made(self) -> Iterator[Recorded]:
        yield self


@pytest.fixture
def planned(make_space) -> list[Any]:
    """Three trials as Tune has them."""
    trials = [
        SweepTrial(planned, "r" * 16, f"{number:016x}", number, "d" * 16, None)
        for number, planned in enumerate(make_space().expand()[:3])
    ]
    return [
        SimpleNamespace(trial_id=str(trial.number), config={TRIAL: trial}, last_result=None)
        for trial in trials
    ]


def told(tracker: Tracker, trial: Any, *results: dict[str, Any]) -> None:
    """What Tune tells of a trial that begins, and of its results; with the last one it ends where it is a row."""
    tracker.on_trial_start(0, [], trial)
    for number, result in enumerate(results, start=1):
        trial.last_result = result | {"training_iteration": number, "pid": 1}
        tracker.on_trial_result(0, [], trial, trial.last_result)
    if results and "status" in results[-1]:
        tracker.on_trial_complete(0, [], trial)


def ended(tracker: Tracker, patience_s: float = 30.0, most_s: float = 30.0) -> list[str]:
    """Ends the tracker; what was waited for."""
    said: list[str] = []
    tracker.end()
    tracker.wait(patience_s, most_s, said.append)
    return said


def test_what_is_told_and_in_which_order(planned, tmp_path, warnings):
    """Values at rungs are not called what those of whole models are called; who was told no end is told that."""
    recorded = Recorded()
    tracker = Tracker("fake", recorded.made(), tmp_path)
    first, second, third = planned
    told(tracker, first, {"status": "finished", "perplexity": 2.0, "sparsity": 0.5, "shards": 2})
    told(tracker, second, {TIME: 1, "validation_perplexity": 3.0})
    tracker.on_trial_complete(0, [], second)
    told(tracker, third)
    assert ended(tracker) == []
    row = {"perplexity": 2.0, "config": {"status": "finished"}, "training_iteration": 1}
    rung = {"rung_validation_perplexity": 3.0, "training_iteration": 1}
    assert recorded.heard == [
        ("setup",),
        ("log_trial_start", "dense"),
        ("log_trial_result", "0", "dense", str(row)),
        ("log_trial_end", "dense", "False"),
        ("log_trial_start", "magnitude/row 0.5"),
        ("log_trial_result", "0", "magnitude/row 0.5", str(rung)),
        ("log_trial_end", "magnitude/row 0.5", "False"),
        ("log_trial_start", "wanda/row 0.5"),
        ("log_trial_end", "wanda/row 0.5", "True"),
        ("on_experiment_end", "[]"),
    ]
    assert warnings() == []


@pytest.mark.parametrize("where", ["setup", "log_trial_start", "log_trial_result", "on_experiment_end"])
def test_one_warning_of_a_tracker_that_fails(planned, tmp_path, warnings, where):
    recorded = Recorded()
    recorded.fails_at = where
    tracker = Tracker("fake", recorded.made(), tmp_path)
    for trial in planned:
        told(tracker, trial, {"status": "finished", "perplexity": 2.0})
    ended(tracker)
    assert warnings() == [f"nothing more is told to fake: no network for {where}; no row is lost"]
    assert sum(name == where for name, *_ in recorded.heard) == 1


def test_nobody_waits_long_for_many_calls_of_which_each_is_answered(planned, tmp_path, warnings):
    recorded = Recorded()
    recorded.seconds = 0.2
    tracker = Tracker("fake", recorded.made(), tmp_path)
    told(tracker, planned[0], *({TIME: number, "validation_perplexity": 3.0} for number in range(100)))
    begin = time.monotonic()
    ended(tracker, patience_s=5.0, most_s=3.0)
    assert time.monotonic() - begin < 10
    assert warnings() == ["nothing more is told to fake: it has not taken all within 3 s; no row is lost"]
    tracker._thread.join()
    assert len(recorded.heard) < 60


def test_the_settings_of_wandb_are_no_environment_that_ray_writes_down(monkeypatch):
    pytest.importorskip("ray.air.integrations.wandb")
    from raysweep.sweep.weights_and_biases import _WithSettings

    monkeypatch.setenv("WANDB_API_KEY", "secret")
    sent: dict[str, Any] = {}
    _WithSettings(SimpleNamespace(remote=lambda **options: sent.update(options))).remote(queue=1)
    assert sent["environment"]["WANDB_API_KEY"] == "secret"
    assert sent.keys() == {"environment", "queue"}


def test_nobody_waits_for_a_tracker_that_hangs(planned, tmp_path, warnings):
    recorded = Recorded()
    recorded.hangs.clear()
    tracker = Tracker("fake", recorded.made(), tmp_path)
    begin = time.monotonic()
    for trial in planned:
        told(tracker, trial, {"status": "finished", "perplexity": 2.0})
    assert time.monotonic() - begin < 1
    assert ended(tracker, patience_s=0.5) == ["Waiting for fake to take what it was told"]
    assert time.monotonic() - begin < 10
    assert warnings() == ["nothing more is told to fake: it has not answered for 0 s; no row is lost"]
    recorded.fails_at = "setup"
    recorded.hangs.set()
    tracker._thread.join()
    assert len(warnings()) == 1
