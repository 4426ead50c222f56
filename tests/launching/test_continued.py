"""Trials that were interrupted go on from the units that they had recovered, and end with the same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch

from raysweep.launching.launch import launch, prepare_launch
from raysweep.reconstruction import recovery
from raysweep.results.cleaning import clean
from raysweep.shards import across, unfinished, worker
from raysweep.shards.worker import ShardWorker
from tests.frames import assert_same_numbers, numbers

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() in (1, 2), reason="two or three shards need as many GPUs, or none"
)

SEQUENTIAL = {"statistics_stream": "recovered", "input_stream": "pruned"}


def space_of(make_space, shards: int = 2, **fields: Any):
    group = {"recovery": "reconstruct", "criterion": "wanda", "sparsity": 0.5, "learning_rate": 0.01}
    return make_space(sweep=[group | fields], execution={"shards": shards})


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, str]]:
    """Granularity and name of every unit that was really trained. Every unit is worth a file."""
    monkeypatch.setattr(unfinished, "WRITING_BYTES_S", float("inf"))
    for clock in ("perf_counter", "thread_time"):  # nothing is learned of what files cost
        monkeypatch.setattr(unfinished, clock, lambda: 0.0)
    units: list[tuple[str, str]] = []
    recovered = recovery._recovered

    def noting(blocks, name, trial, unit):
        if len(units) == limit[0]:
            raise KeyboardInterrupt
        units.append((str(trial.granularity), unit.name))
        return recovered(blocks, name, trial, unit)

    monkeypatch.setattr(recovery, "_recovered", noting)
    limit[0] = None
    return units


limit: list[int | None] = [None]
"""After how many units the user loses patience."""


@pytest.mark.parametrize(
    "fields",
    [
        {"granularity": ["matrix", "subblock"]},
        {"granularity": "subblock", "trainable": "lora+norms"},
        {"granularity": "matrix", "optimizer": "exact"},
        {"granularity": ["subblock", "window:2"], **SEQUENTIAL},
    ],
    ids=["matrix and subblock", "LoRA", "exact", "sequential"],
)
def test_no_unit_is_recovered_twice(make_space, tmp_path, trained, fields):
    if fields.get("optimizer") == "exact":
        fields = {"learning_rate": None, **fields}
    space = space_of(make_space, **fields)
    launch(space, storage=tmp_path / "whole", in_process=True)
    units = list(trained)
    trained.clear()
    assert interrupted_again_and_again(space, tmp_path / "again", trained) >= len(units) // 5 - 1
    assert sorted(trained) == sorted(units)
    assert_same_numbers(tmp_path / "whole" / "tiny", tmp_path / "again" / "tiny")
    assert not (tmp_path / "again" / "tiny" / "unfinished").exists()


def test_a_damaged_file_only_costs_its_unit(make_space, tmp_path, trained):
    space = space_of(make_space, granularity="block")
    launch(space, storage=tmp_path / "whole", in_process=True)
    trained.clear()
    limit[0] = 3
    with pytest.raises(KeyboardInterrupt):
        launch(space, storage=tmp_path / "again", in_process=True)
    files = sorted((tmp_path / "again" / "tiny" / "unfinished").glob("*/*.safetensors"))
    assert len(files) == 3
    files[1].write_bytes(files[1].read_bytes()[:-100])
    files[2].write_bytes(b"")
    limit[0] = None
    launch(space, storage=tmp_path / "again", in_process=True)
    assert len(trained) == 3 + 1 + 2  # four blocks
    assert_same_numbers(tmp_path / "whole" / "tiny", tmp_path / "again" / "tiny")


def test_units_with_losses_on_another_validation_set_are_not_taken_over(make_space, tmp_path, trained):
    limit[0] = 3
    with pytest.raises(KeyboardInterrupt):
        launch(space_of(make_space, granularity="block"), storage=tmp_path / "again", in_process=True)
    limit[0] = None
    group = {"recovery": "reconstruct", "criterion": "wanda", "sparsity": 0.5, "learning_rate": 0.01}
    other = make_space(
        sweep=[group | {"granularity": "block"}], execution={"shards": 2}, validation={"samples": 2}
    )
    launch(other, storage=tmp_path / "again", in_process=True)
    launch(other, storage=tmp_path / "whole", in_process=True)
    expected, found = (numbers(tmp_path / part / "tiny")[1] for part in ("whole", "again"))
    pd.testing.assert_frame_equal(found, expected, check_exact=True)  # the old dense row has no units
    assert not (tmp_path / "again" / "tiny" / "unfinished").exists()


def interrupted_again_and_again(space, storage, done: list[Any]) -> int:
    """Launches until the sweep is finished, while the user loses patience after every fifth of what is noted in
    `done`; returns how often that was."""
    for interruptions in range(200):
        limit[0] = len(done) + 5
        try:
            launch(space, storage=storage, in_process=True)
            return interruptions
        except KeyboardInterrupt:
            pass
    raise AssertionError(f"no end in sight: {done}")


def test_no_batch_is_evaluated_twice(make_space, tmp_path, monkeypatch):
    """Of the dense model, of pruned ones that have no row of their own, of recovered ones, and before recovery."""
    batches: list[tuple[str | None, str, int]] = []
    forward = ShardWorker.forward

    def noting(worker, name, ends_here, text, start, stop, before):
        if worker.shard.is_last:
            if len(batches) == limit[0]:
                raise KeyboardInterrupt
            batches.append((name, text, start))
        return forward(worker, name, ends_here, text, start, stop, before)

    monkeypatch.setattr(ShardWorker, "forward", noting)
    monkeypatch.setattr(
        worker, "batches", lambda samples, tokens, device: map(slice, range(samples), range(1, samples + 1))
    )
    group = {"recovery": "reconstruct", "criterion": "wanda", "sparsity": 0.5, "learning_rate": 0.01}
    space = make_space(
        sweep=[
            {"recovery": "none", "criterion": "magnitude", "sparsity": 0.5},
            group | {"granularity": "block"},
            group | {"granularity": "block"} | SEQUENTIAL,
        ],
        execution={"shards": 2},
    )
    limit[0] = None
    launch(space, storage=tmp_path / "whole", in_process=True)
    expected = list(batches)
    batches.clear()
    assert interrupted_again_and_again(space, tmp_path / "again", batches) >= len(expected) // 5 - 1
    assert sorted(batches, key=str) == sorted(expected, key=str)
    assert_same_numbers(tmp_path / "whole" / "tiny", tmp_path / "again" / "tiny")
    assert not (tmp_path / "again" / "tiny" / "unfinished").exists()


@pytest.fixture
def impatient(monkeypatch) -> dict[str, bool]:
    """While `is` is set, the user interrupts once all units of a trial are recovered."""
    state, forward = {"is": False}, ShardWorker.forward

    def interrupting(worker, name, *more):
        if state["is"] and name is not None and "@" not in name:
            raise KeyboardInterrupt
        return forward(worker, name, *more)

    monkeypatch.setattr(ShardWorker, "forward", interrupting)
    return state


@pytest.mark.parametrize("fields", [{}, SEQUENTIAL], ids=["dense inputs", "sequential"])
@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
@pytest.mark.parametrize("then", [1, 3])
def test_units_across_shards_are_taken_over_by_others(
    make_space, tmp_path, trained, monkeypatch, impatient, fields, damaged, then
):
    """Four blocks in windows of three: the first one reaches over both shards; in the end it lies in one, or in two of
    three."""
    again, ranges, real = tmp_path / "again", list[range](), across._trained
    monkeypatch.setattr(across, "_trained", lambda *all: ranges.append(all[-1]) or real(*all))
    space = space_of(make_space, granularity="window:3", **fields)
    launch(space, storage=tmp_path / "whole", in_process=True)
    impatient["is"] = True
    with pytest.raises(KeyboardInterrupt):
        launch(space, storage=again, in_process=True)
    impatient["is"] = False
    parts = sorted((again / "tiny" / "unfinished").glob("*/*.block-*.safetensors"))
    assert len(parts) == 3
    prepared = prepare_launch(space, again / "tiny", "cpu")
    kept = sum(path.stat().st_size for path in (again / "tiny" / "unfinished").rglob("*"))
    assert 0 < kept < prepared.storage_bytes(prepared.models[0], concurrent_trials=1)
    if damaged:
        parts[1].write_bytes(b"")
    ranges.clear()
    trained.clear()
    launch(
        space_of(make_space, shards=then, granularity="window:3", **fields), storage=again, in_process=True
    )
    assert ranges == [range(2)] * (damaged and then == 3)
    assert trained == [("window:3", "0-2")] * (damaged and then == 1)
    assert_same_numbers(tmp_path / "whole" / "tiny", again / "tiny")
    assert not (again / "tiny" / "unfinished").exists()


def test_a_unit_of_one_shard_is_taken_over_by_several(make_space, tmp_path, trained, impatient):
    impatient["is"] = True
    with pytest.raises(KeyboardInterrupt):
        launch(
            space_of(make_space, shards=1, granularity="model"), storage=tmp_path / "again", in_process=True
        )
    impatient["is"] = False
    assert len(trained) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(across, "_trained", None)  # nothing is left to be trained
        launch(
            space_of(make_space, shards=3, granularity="model"), storage=tmp_path / "again", in_process=True
        )
    launch(space_of(make_space, granularity="model"), storage=tmp_path / "whole", in_process=True)
    assert_same_numbers(tmp_path / "whole" / "tiny", tmp_path / "again" / "tiny")


def test_batches_belong_to_the_weights_that_they_were_measured_with(make_space, tmp_path, trained, impatient):
    """A unit that is recovered anew to other weights, as on another device, is not measured by old batches."""
    space = space_of(make_space, granularity="block")
    stopped, forward = [], ShardWorker.forward

    def interrupting(worker, name, text, start, *more):
        if name is not None and "@" not in name and stopped == ["soon"] and text != "calibration":
            raise KeyboardInterrupt
        if name is not None and "@" not in name and not stopped and worker.shard.is_last:
            stopped.append("soon")
        return forward(worker, name, text, start, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWorker, "forward", interrupting)
        with pytest.raises(KeyboardInterrupt):
            launch(space, storage=tmp_path / "again", in_process=True)
    folder = next((tmp_path / "again" / "tiny" / "unfinished").glob("*/*.safetensors")).parent
    assert list(folder.glob("end-*.jsonl"))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    recovered = recovery._recovered

    def otherwise(blocks, name, trial, unit):
        result = recovered(blocks, name, trial, unit)
        weight = blocks.weights[name][f"{next(iter(unit.linears))}.weight"]
        weight *= 1.01
        return replace(result, loss_after=result.loss_after * 1.01)

    for name in ("again", "whole"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recovery, "_recovered", otherwise)
            launch(space, storage=tmp_path / name, in_process=True)
    assert_same_numbers(tmp_path / "whole" / "tiny", tmp_path / "again" / "tiny")


def test_start_weights_go_on_too(make_space, tmp_path, trained):
    start = {"granularity": "block", "learning_rate": 0.01}
    group = {"recovery": "retrain", "criterion": "wanda", "sparsity": 0.5, "learning_rate": 0.001}
    space = make_space(sweep=[group | {"start_from": start}])
    limit[0] = 3
    with pytest.raises(KeyboardInterrupt):
        launch(space, storage=tmp_path, in_process=True)
    limit[0] = None
    assert (launch(space, storage=tmp_path, in_process=True).status == "finished").all()
    assert len(trained) == len(set(trained)) == 4
    assert not (tmp_path / "tiny" / "unfinished").exists()


def test_clean_removes_them(make_space, tmp_path, trained):
    limit[0] = 3
    with pytest.raises(KeyboardInterrupt):
        launch(space_of(make_space, granularity="block"), storage=tmp_path, in_process=True)
    assert clean(tmp_path / "tiny").nbytes > 0
    assert not (tmp_path / "tiny" / "unfinished").exists()
