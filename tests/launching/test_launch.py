"""Sweeps without Ray: what rows say, what is shared, what is never run again, and what fails."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from raysweep.errors import NumericalError, RaysweepError, StorageError, UsageError
from raysweep.launching.launch import launch
from raysweep.launching.progress import Silent
from raysweep.launching.runners import InProcess
from raysweep.reconstruction import pruner
from raysweep.results import cleaning
from raysweep.results.folders import TRIALS, UNITS, row_files
from raysweep.results.lock import holder_of, launch_lock
from raysweep.results.reader import load_results, load_units
from raysweep.results.state import SweepState
from raysweep.shards.local import LocalGroup
from raysweep.shards.worker import ShardWorker
from raysweep.sweep.prepare import prepare
from tests.frames import assert_same_numbers


def launched(space, storage):
    return launch(space, storage=storage, in_process=True)


@pytest.fixture
def calls(monkeypatch):
    """Names of the workers' methods in the order in which they were called."""
    seen: list[str] = []
    submit = LocalGroup.submit

    def noting(self, shard, order, method, *arguments, label=""):
        seen.append(method)
        return submit(self, shard, order, method, *arguments, label=label)

    monkeypatch.setattr(LocalGroup, "submit", noting)
    return seen


def test_rows_tell_the_whole_story(make_space, tmp_path):
    space = make_space()
    rows = launched(space, tmp_path)
    assert list(rows.status.unique()) == ["finished"]
    assert rows.recovery.value_counts().to_dict() == {"reconstruct": 6, "none": 2, "dense": 1}
    dense = rows[rows.recovery == "dense"].iloc[0]
    assert (rows.dense_perplexity == dense.perplexity).all()
    assert (rows.perplexity == rows.perplexity_test).all()
    pruned = rows[rows.recovery == "none"].set_index("criterion")
    recovered = rows[rows.recovery == "reconstruct"]
    for _, row in recovered.iterrows():
        assert row.pruned_perplexity == pruned.loc[row.criterion].perplexity
        assert row.unit_error_after < row.unit_error_before
        assert row.output_error_calibration < pruned.loc[row.criterion].output_error_calibration
        assert row.peak_recovery_bytes > 0
        assert row.training_flops > 0
        assert row.tokens_trained == row.tokens_unique == 6 * 32
        assert row.optimizer_steps == 3
    assert rows[rows.recovery != "dense"].realized_sparsity.between(0.49, 0.5).all()
    assert (rows.device_seconds_standalone >= rows.device_seconds - 1e-9).all()
    assert json.loads(dense.evaluation_protocol)["perplexity"][0]["name"] == "test"


def test_what_the_processes_of_trials_are_sent_is_read_without_torch(make_space, tmp_path, monkeypatch):
    sent = []
    run = InProcess.run
    monkeypatch.setattr(
        InProcess,
        "run",
        lambda self, group, proposals, rows, plan, search, on_row: (
            sent.append(pickle.dumps((rows, group.info, search)))
            or run(self, group, proposals, rows, plan, search, on_row)
        ),
    )
    launched(make_space(), tmp_path)
    (tmp_path / "sent").write_bytes(sent[0])
    code = "import pickle, sys; pickle.load(open('sent', 'rb')); print('torch' in sys.modules, 'ray' in sys.modules)"
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert child.stdout.split() == ["False", "False"]


def test_units_have_a_row_per_unit_per_linear_and_per_block(make_space, tmp_path):
    rows = launched(make_space(), tmp_path).set_index("trial_id")
    units = load_units("tiny", tmp_path).join(rows[["recovery", "granularity"]], on="trial_id")
    counts = units.groupby(["recovery", "granularity", "kind"], dropna=False).size()
    assert counts["none"].droplevel(0).to_dict() == {"block": 2 * 4, "linear": 2 * 4 * 7}
    for granularity, per_block in {"matrix": 7, "subblock": 2, "block": 1}.items():
        assert counts["reconstruct", granularity, "unit"] == 2 * 4 * per_block
    last = units[(units.kind == "block") & (units.block == 3)].set_index("trial_id")
    pd.testing.assert_series_equal(
        last.error_after, rows.output_error_calibration.loc[last.index], check_names=False, check_exact=True
    )


def test_perplexity_is_that_of_the_whole_model(make_space, tmp_path, tiny_llama):
    space = make_space()
    rows = launched(space, tmp_path)
    tokens = torch.from_numpy(np.array(prepare(space, "cpu")[0].evaluation["test"].input_ids))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())
    assert rows[rows.recovery == "dense"].perplexity.item() == pytest.approx(loss.exp().item(), rel=1e-6)


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_the_number_of_shards_changes_no_number(make_space, tmp_path, shards):
    launched(make_space(execution={"shards": 1}), tmp_path / "one")
    launched(make_space(execution={"shards": shards}), tmp_path / "more")
    assert_same_numbers(tmp_path / "one" / "tiny", tmp_path / "more" / "tiny")


def test_dense_pass_statistics_and_masks_are_made_once_for_all_trials(
    make_space, tmp_path, calls, monkeypatch
):
    made: list[str] = []
    prune_layer = pruner.prune_layer
    monkeypatch.setattr(
        pruner,
        "prune_layer",
        lambda recipe, view, own: made.append(view.name) or prune_layer(recipe, view, own),
    )
    launched(make_space(execution={"shards": 2}), tmp_path)
    batches = 2  # one of calibration and one of validation
    assert calls.count("dense_pass") == 2 * batches
    assert len(made) == 2 * 4 * 7  # criteria, blocks, linears
    assert len(set(made)) == 4 * 7


def test_many_files_become_one(make_space, tmp_path, monkeypatch, calls):
    """And where they cannot, that costs no row."""
    folder = tmp_path / "tiny"

    def masks(*sparsities: float):
        return make_space(sweep=[{"recovery": "none", "criterion": "wanda", "sparsity": [*sparsities]}])

    def full(*_):
        raise StorageError("no space left")

    launched(masks(0.5), tmp_path)
    assert len(list(row_files(folder, TRIALS))) == 2  # few stay apart
    monkeypatch.setattr(cleaning, "MANY", 2)
    with monkeypatch.context() as patched:
        patched.setattr(cleaning, "compact", full)
        before, units = launched(masks(0.5, 0.6), tmp_path), load_units(folder)
    assert len(list(row_files(folder, TRIALS))) == len(before) == 3
    after = launched(masks(0.5, 0.6, 0.7), tmp_path)
    assert not [*row_files(folder, TRIALS), *row_files(folder, UNITS)]
    known = after[after.trial_id.isin(before.trial_id)].reset_index(drop=True)
    pd.testing.assert_frame_equal(known, before)
    assert len(load_units(folder)) > len(units)
    calls.clear()
    launched(masks(0.5, 0.6, 0.7), tmp_path)
    assert calls == []


def test_a_finished_trial_is_never_run_again_and_a_grid_can_grow(make_space, space_dict, tmp_path, calls):
    first = launched(make_space(), tmp_path)
    calls.clear()
    again = launched(make_space(), tmp_path)
    assert calls == []
    pd.testing.assert_frame_equal(first, again)
    space_dict["sweep"][1]["learning_rate"] = [0.01, 0.02]
    grown = launched(make_space(), tmp_path)
    assert len(grown) == len(first) + 6
    assert calls.count("recover") == 2 * 4 * (7 + 2 + 1)
    assert set(first.trial_id) < set(grown.trial_id)
    old = grown[grown.trial_id.isin(first.trial_id)].reset_index(drop=True)
    pd.testing.assert_frame_equal(old, first)
    new = grown[~grown.trial_id.isin(first.trial_id)]
    assert new.pruned_perplexity.notna().all()


def test_a_grown_sweep_equals_one_launched_whole(make_space, tmp_path):
    launched(make_space(sweep=make_space().to_dict()["sweep"][:1]), tmp_path / "grown")
    launched(make_space(), tmp_path / "grown")
    launched(make_space(), tmp_path / "whole")
    assert_same_numbers(tmp_path / "grown" / "tiny", tmp_path / "whole" / "tiny")


def test_calibration_sets_follow_one_another_on_shards_that_stay(make_space, tmp_path, monkeypatch):
    loaded: list[int] = []
    init = ShardWorker.__init__
    monkeypatch.setattr(
        ShardWorker, "__init__", lambda self, spec: loaded.append(spec.start) or init(self, spec)
    )
    rows = launched(make_space(calibration={"seed": [0, 1, 2]}, execution={"shards": 2}), tmp_path)
    assert loaded == [0, 2]
    assert rows[rows.recovery == "dense"].calibration_seed.isna().all()
    assert rows.groupby("calibration_seed").size().to_dict() == {0: 8, 1: 8, 2: 8}
    assert (
        rows[rows.criterion == "wanda"]
        .groupby(["recovery", "granularity"], dropna=False)
        .perplexity.nunique()
        .min()
        == 3
    )
    assert (rows.seed.dropna() == rows.calibration_seed[rows.seed.notna()]).all()
    alone = launched(make_space(calibration={"seed": 2}), tmp_path / "alone").set_index("trial_id")
    same = rows.set_index("trial_id").loc[alone.index]
    assert (same.perplexity == alone.perplexity).all()


def test_a_numerical_failure_is_a_row_that_says_why_and_the_sweep_goes_on(make_space, space_dict, tmp_path):
    space_dict["sweep"][1] |= {
        "criterion": "wanda",
        "granularity": ["block", "matrix"],
        "learning_rate": [1e30, 0.01],
    }
    rows = launched(make_space(), tmp_path)
    failed = rows[rows.status == "failed"]
    assert set(failed.learning_rate) == {1e30}
    assert failed.error.str.contains("not finite").all()
    assert failed.perplexity.isna().all()
    assert (rows[rows.learning_rate == 0.01].status == "finished").all()
    assert SweepState.read(tmp_path / "tiny").state == "failed"


def test_a_numerical_failure_stays_unless_it_is_to_be_tried_again(make_space, tmp_path, monkeypatch, calls):
    def broken(self, *arguments):
        raise NumericalError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWorker, "recover", broken)
        launched(make_space(), tmp_path)
    calls.clear()
    rows = launched(make_space(), tmp_path)
    assert calls == []
    assert rows[rows.status == "failed"].error_kind.tolist() == ["numerical"] * 6
    rows = launch(make_space(), storage=tmp_path, in_process=True, retry_failed=True)
    assert (rows.status == "finished").all()


def test_nothing_begins_after_a_failure_when_that_is_asked_for(make_space, tmp_path, monkeypatch):
    def broken(self, *arguments):
        raise OSError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWorker, "recover", broken)
        rows = launch(make_space(), storage=tmp_path, in_process=True, fail_fast=True)
    assert rows.status.tolist() == ["finished"] * 3 + ["failed"]
    assert (launched(make_space(), tmp_path).status == "finished").all()


def test_a_failed_trial_runs_again_and_its_row_is_replaced(make_space, tmp_path, monkeypatch):
    def broken(self, *arguments):
        raise OSError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWorker, "recover", broken)
        rows = launched(make_space(), tmp_path)
        assert (rows.status == "failed").sum() == 6
    rows = launched(make_space(), tmp_path)
    assert (rows.status == "finished").all()
    assert len(rows) == 9


def test_trials_leave_nothing_in_the_workers(make_space, tmp_path, monkeypatch):
    workers: list[ShardWorker] = []
    init = ShardWorker.__init__
    monkeypatch.setattr(ShardWorker, "__init__", lambda self, spec: workers.append(self) or init(self, spec))
    launched(make_space(execution={"shards": 2}), tmp_path)
    assert [worker.blocks.weights for worker in workers] == [{}, {}]
    assert [worker.blocks.recipes for worker in workers] == [{}, {}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": [{"recovery": "none", "criterion": "wanda", "pattern": "5:10"}]}, "10 divides"),
        ({"calibration": {"num_samples": 100_000}}, "num_samples"),
        ({"calibration": {"sequence_length": 65}}, "64"),
        ({"model": {"path": "./nowhere"}}, "nowhere"),
        ({"execution": {"shards": 5}}, "4 blocks"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(make_space, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        launched(make_space(**changes), tmp_path / "storage")
    assert not (tmp_path / "storage").exists()


def test_storage_below_a_file_is_refused(make_space, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        launched(make_space(), tmp_path / "file" / "storage")


def test_results_can_be_loaded_by_name(make_space, tmp_path):
    rows = launched(make_space(), tmp_path)
    pd.testing.assert_frame_equal(load_results("tiny", tmp_path), rows)


def test_a_second_launch_of_a_running_sweep_is_refused(make_space, tmp_path):
    (tmp_path / "tiny").mkdir()
    with (
        launch_lock(tmp_path / "tiny"),
        pytest.raises(UsageError, match=f"already, as process {os.getpid()} on"),
    ):
        launched(make_space(), tmp_path)
    assert not (tmp_path / "tiny" / "trials").exists()


def test_a_sweep_is_in_hand_before_ray_starts_and_leaves_nothing_where_it_does_not(
    make_space, tmp_path, monkeypatch
):
    folder = tmp_path / "storage" / "tiny"
    seen: list[bool] = []

    @contextmanager
    def failing(address: str | None) -> Iterator[None]:
        holder = holder_of(folder)
        seen.append(holder is not None and holder.pid == os.getpid())
        raise RaysweepError("planted")
        yield

    monkeypatch.setattr("raysweep.cluster.connect.connected", failing)
    with pytest.raises(RaysweepError, match="planted"):
        launch(make_space(), storage=folder.parent, address="local")
    assert seen == [True]
    assert not folder.parent.exists()


def test_the_state_of_a_process_that_is_gone_refuses_nothing(make_space, tmp_path):
    """Its number may be another's by now."""
    (tmp_path / "tiny").mkdir()
    SweepState("tiny", pid=os.getppid()).write(tmp_path / "tiny")
    assert (launched(make_space(), tmp_path).status == "finished").all()
    assert not list((tmp_path / "tiny").glob("*.lock"))


@pytest.mark.parametrize("method", ["prune", "recover", "forward"])
def test_a_failing_trial_leaves_no_weights_and_wakes_who_waits(make_space, tmp_path, monkeypatch, method):
    """The second call of `method` fails, once: one trial is lost, and its shared work is done by another."""
    workers: list[ShardWorker] = []
    init, working = ShardWorker.__init__, getattr(ShardWorker, method)
    monkeypatch.setattr(ShardWorker, "__init__", lambda self, spec: workers.append(self) or init(self, spec))
    calls: list[int] = []

    def failing_once(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("planted")
        return working(self, *arguments)

    monkeypatch.setattr(ShardWorker, method, failing_once)
    rows = launched(make_space(execution={"shards": 2}), tmp_path)
    assert rows.status.value_counts().to_dict() == {"finished": 8, "failed": 1}
    assert rows.error.dropna().tolist() == ["OSError: planted"]
    assert [worker.blocks.weights for worker in workers] == [{}, {}]
    healthy = launched(make_space(), tmp_path / "healthy").set_index("trial_id")
    finished = rows[rows.status == "finished"].set_index("trial_id")
    assert (finished.perplexity == healthy.perplexity.loc[finished.index]).all()
    assert (
        finished.pruned_perplexity.dropna() == healthy.pruned_perplexity.loc[finished.index].dropna()
    ).all()


def test_a_recovery_survives_that_the_model_before_it_could_not_be_evaluated(
    make_space, tmp_path, monkeypatch
):
    forward = ShardWorker.forward

    def damaged(self, name, *arguments):
        measures = forward(self, name, *arguments)
        if name is None or not name.startswith("pruned"):
            return measures
        return replace(measures, losses=[float("nan")] * len(measures.losses))

    monkeypatch.setattr(ShardWorker, "forward", damaged)
    rows = launched(make_space(execution={"shards": 1}), tmp_path).set_index("recovery")
    assert (rows.status.loc["none"] == "failed").all()
    assert (rows.status.loc["reconstruct"] == "finished").all()
    assert rows.pruned_perplexity.loc["reconstruct"].isna().all()


def test_equal_calibration_sets_are_refused(make_space, tmp_path):
    ids = [[k % 100 + 2] * 32 for k in range(20)]
    pd.DataFrame({"input_ids": ids}).to_parquet(tmp_path / "rows.parquet")
    calibration = {"dataset": str(tmp_path / "rows.parquet"), "seed": [0, 1]}
    with pytest.raises(UsageError, match="hold the same tokens"):
        launched(make_space(calibration=calibration), tmp_path / "storage")


def test_rows_of_another_model_in_the_folder_are_counted_apart(make_space, tmp_path, tiny_llama):
    pruned = {"sweep": make_space().to_dict()["sweep"][:1]}
    launched(make_space(**pruned), tmp_path)
    longer = make_space(**pruned, calibration={"num_samples": 5})
    heard: list[tuple[int, int, int]] = []
    progress = Silent()
    progress.begin = lambda planned, finished, failed, dashboard, others: heard.append(
        (planned, finished, others)
    )
    launch(longer, storage=tmp_path, in_process=True, progress=progress)
    assert heard == [(3, 1, 2)]  # the dense trial has seen no calibration set
