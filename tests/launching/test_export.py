"""Kept trials and exports of sweeps in process: what stays, what is computed again, what is refused."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raysweep.errors import RaysweepError, StorageError, UsageError
from raysweep.launching import recomputing
from raysweep.launching.exporting import Export, export
from raysweep.launching.launch import launch, prepare_launch
from raysweep.results.artifacts import artifact_folder, kept_trials
from raysweep.results.folders import ARTIFACTS
from raysweep.results.writer import write_rows
from raysweep.shards import trial as trials
from raysweep.shards.worker import ShardWorker
from raysweep.sweep.prepare import prepare
from tests.exported import check_zeros, plain_perplexity
from tests.frames import assert_same_numbers

WANDA = {"criterion": "wanda", "sparsity": 0.5}
BLOCK = {"recovery": "reconstruct", **WANDA, "granularity": "block", "learning_rate": 0.01}
KINDS: dict[str, dict[str, Any]] = {
    "none": {"recovery": "none", **WANDA},
    "adamw": BLOCK,
    "exact": {"recovery": "reconstruct", **WANDA, "granularity": "matrix", "optimizer": "exact"},
    "lora": BLOCK | {"trainable": "lora", "lora_rank": 4},
    "sparsegpt": {"recovery": "none", "criterion": "sparsegpt", "sparsity": 0.5},
    "2:4": BLOCK | {"sparsity": 0.5, "pattern": "2:4", "granularity": "subblock"},
    "streams": BLOCK | {"statistics_stream": "recovered", "input_stream": "pruned"},
    "retrain": {"recovery": "retrain", **WANDA, "learning_rate": 0.003},
    "retrain lora": {
        "recovery": "retrain",
        **WANDA,
        "learning_rate": 0.003,
        "trainable": "lora",
        "lora_rank": 4,
        "start_from": {"granularity": "block", "learning_rate": 0.01},
    },
}


def launched(space, storage: Path) -> pd.DataFrame:
    return launch(space, storage=storage, in_process=True)


def kept_ids(folder: Path) -> set[str]:
    return {kept.trial_id for kept in kept_trials(folder)}


def ids_of(space) -> Any:
    """Token ids of the text that the column `perplexity` is measured on."""
    return prepare(space, "cpu")[0].evaluation["test"].input_ids


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def exporting(tmp_path, told) -> Callable[..., tuple[Path, Export]]:
    """exporting(trial_id, storage): exports into a new folder."""

    def run(trial: str, storage: Path, **options: Any) -> tuple[Path, Export]:
        output = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        return output, export(trial, output, storage=storage, tell=told.append, **options)

    return run


@pytest.mark.parametrize(
    ("said", "carried"),
    [
        ({"license": "other", "license_name": "ours", "license_link": "LICENSE"}, None),
        ({"license": ["mit", "apache-2.0"], "license_link": "https://example.org/licence"}, None),
        ({"license": "other", "license_link": "LICENSE.pdf"}, {"license": "other"}),  # which is not copied
        ({"license_name": "ours", "license_link": "LICENSE"}, {}),
    ],
)
def test_the_licence_goes_along(make_space, tiny_llama, tmp_path, exporting, said, carried):
    dense = shutil.copytree(tiny_llama, tmp_path / "dense")
    (dense / "README.md").write_text(
        f"---\n{yaml.safe_dump(said | {'tags': ['dense']})}---\n# A dense model\n"
    )
    (dense / "LICENSE").write_text("Do as we say.")
    rows = launched(make_space(model={"path": str(dense)}, sweep=[KINDS["none"]]), tmp_path)
    output, _ = exporting(rows[rows.recovery == "none"].iloc[0].trial_id, tmp_path)
    card = yaml.safe_load((output / "README.md").read_text().split("---")[1])
    assert {key: value for key, value in card.items() if "license" in key} == (
        said if carried is None else carried
    )
    assert "dense" not in card["tags"]
    assert (output / "LICENSE").read_text() == "Do as we say."


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reloads_with_the_perplexity_of_its_row(make_space, tmp_path, exporting, told, kind):
    """Kept, and computed again: the same files."""
    space = make_space(sweep=[KINDS[kind]], execution={"keep": "all", "shards": 2})
    rows = launched(space, tmp_path)
    (row,) = rows[rows.recovery != "dense"].to_dict("records")
    output, done = exporting(row["trial_id"], tmp_path)
    assert done.recomputed is None
    assert plain_perplexity(output, ids_of(space)) == pytest.approx(row["perplexity"], rel=1e-6)
    masks = load_file(output / "masks.safetensors")
    pruned = {name: mask for name, mask in masks.items() if mask.dtype == torch.uint8}
    share = check_zeros(output) / sum(mask.numel() for mask in pruned.values())
    assert share == pytest.approx(row["realized_sparsity"])
    assert (len(masks) > len(pruned)) == (kind == "sparsegpt")
    if kind == "2:4":
        for mask in pruned.values():
            assert (mask.view(-1, 4).sum(1) == 2).all()
    shutil.rmtree(tmp_path / "tiny" / ARTIFACTS)
    again, done = exporting(row["trial_id"], tmp_path)
    assert "This trial was not kept, so it is computed again" in told
    assert (
        done.recomputed
        == "computed again for this export; its perplexity and that of the row are equal to the bit"
    )
    for file in output.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_the_folder_says_what_it_is(make_space, tmp_path, exporting):
    space = make_space(sweep=[KINDS["none"], BLOCK])
    rows = launched(space, tmp_path)
    row = rows[rows.recovery == "reconstruct"].iloc[0]
    output, done = exporting(row.trial_id, tmp_path)
    assert sorted(path.name for path in output.iterdir()) == sorted(done.files)
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1  # that of any new file
    assert json.loads((output / "raysweep.json").read_text())["trial_id"] == row.trial_id
    card = (output / "README.md").read_text()
    for words in (f"{row.perplexity:.4f}", f"{row.dense_perplexity:.4f}", f"{row.pruned_perplexity:.4f}"):
        assert words in card
    for words in (row.trial_id, row.recovery_id, "granularity: block", "huggingface_hub", "not rounded"):
        assert words in card
    assert str(tmp_path) not in card  # nor any other folder of this machine
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer("kalo").input_ids[0] == 1


def test_the_best_of_every_cell_stays(make_space, tmp_path):
    """Launch by launch: a better one replaces what is kept, a worse one is never kept, rows of others count."""
    sweep = [KINDS["none"], BLOCK | {"learning_rate": [0.01, 1e-6]}]
    first = launched(make_space(sweep=sweep), tmp_path)

    def best(rows: pd.DataFrame) -> set[str]:
        pruned = rows[rows.recovery != "dense"]
        return set(pruned.loc[pruned.groupby("recovery").validation_perplexity.idxmin()].trial_id)

    assert kept_ids(tmp_path / "tiny") == best(first)
    sweep[1]["learning_rate"] = [0.01, 1e-6, 0.02, 1e-7, 0.003]
    grown = launched(make_space(sweep=sweep), tmp_path)
    assert len(grown) == len(first) + 3
    assert kept_ids(tmp_path / "tiny") == best(grown)


def test_all_none_and_changes_between_launches(make_space, tmp_path):
    folder = tmp_path / "tiny"
    sweep = [KINDS["none"], BLOCK | {"learning_rate": [0.01, 1e-6]}]
    launched(make_space(sweep=sweep, execution={"keep": "none"}), tmp_path)
    assert not (folder / ARTIFACTS).exists()
    sweep[1]["learning_rate"] = [0.01, 1e-6, 1e-7]  # the last is worse than a row that was not kept
    launched(make_space(sweep=sweep, execution={"keep": "best"}), tmp_path)
    assert kept_ids(folder) == set()
    sweep[1]["learning_rate"] = [0.01, 1e-6, 1e-7, 1e-5, 2e-6]
    rows = launched(make_space(sweep=sweep, execution={"keep": "all"}), tmp_path)
    assert kept_ids(folder) == set(rows[rows.learning_rate.isin([1e-5, 2e-6])].trial_id)
    launched(make_space(sweep=sweep, execution={"keep": "best"}), tmp_path)
    assert len(kept_ids(folder)) == 2  # what has nothing to run removes nothing
    sweep[1]["learning_rate"].append(3e-7)
    launched(make_space(sweep=sweep, execution={"keep": "best"}), tmp_path)
    assert kept_ids(folder) == set(rows[rows.learning_rate == 1e-5].trial_id)


def test_weights_that_wait_for_tasks_outlast_a_launch_without_them(make_space, tmp_path):
    folder = tmp_path / "tiny"
    sweep = [BLOCK | {"learning_rate": [0.01, 1e-6]}]
    launched(make_space(sweep=sweep, execution={"keep": "all"}), tmp_path)
    waiting = kept_ids(folder)
    for kept in kept_trials(folder):
        replace(kept, waits=True).write(artifact_folder(folder, kept.trial_id))
    sweep[0]["learning_rate"].append(1e-7)
    launched(make_space(sweep=sweep, execution={"keep": "best"}), tmp_path)
    assert len(waiting) == 2
    assert waiting <= kept_ids(folder)


def test_keeping_changes_no_number(make_space, tmp_path):
    sweep = [KINDS["none"], BLOCK, KINDS["streams"], KINDS["sparsegpt"]]
    for keep in ("none", "all"):
        launched(make_space(sweep=sweep, execution={"keep": keep, "shards": 2}), tmp_path / keep)
    assert_same_numbers(tmp_path / "none" / "tiny", tmp_path / "all" / "tiny")


def test_what_was_interrupted_leaves_nothing_and_is_kept_in_the_end(make_space, tmp_path, monkeypatch):
    """The launch ends behind the weights of a trial and before its row."""
    space = make_space(sweep=[BLOCK])

    def ended(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            "raysweep.sweep.rows.write_rows",
            lambda folder, row, *rest: (
                ended() if row["recovery"] != "dense" else write_rows(folder, row, *rest)
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            launched(space, tmp_path)
    assert len(kept_ids(tmp_path / "tiny")) == 1
    stale = tmp_path / "tiny" / ARTIFACTS / ("0" * 16)
    stale.mkdir()
    rows = launched(space, tmp_path)
    assert not stale.exists()
    assert kept_ids(tmp_path / "tiny") == set(rows[rows.recovery == "reconstruct"].trial_id)


def test_weights_that_cannot_be_written_cost_no_row(make_space, tmp_path, monkeypatch):
    def full(self, *arguments: Any) -> None:
        raise StorageError.of("block", OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(ShardWorker, "write_weights", full)
    seen: list[dict[str, Any]] = []
    from raysweep.launching.progress import Silent

    progress = Silent()
    progress.row = seen.append  # type: ignore[method-assign]
    rows = launch(make_space(sweep=[BLOCK]), storage=tmp_path, in_process=True, progress=progress)
    assert (rows.status == "finished").all()
    assert "No space left" in next(row["not_kept"] for row in seen if row["recovery"] == "reconstruct")
    assert kept_ids(tmp_path / "tiny") == set()


def test_a_trial_that_fails_behind_its_weights_is_not_kept(make_space, tmp_path, monkeypatch):
    from raysweep.shards import trial as module

    def broken(*_: Any) -> None:
        raise RaysweepError("planted")

    monkeypatch.setattr(module, "unit_columns", broken)
    rows = launched(make_space(sweep=[BLOCK]), tmp_path)
    assert rows[rows.recovery == "reconstruct"].status.tolist() == ["failed"]
    assert not list((tmp_path / "tiny" / ARTIFACTS).glob("*"))


def test_damaged_weights_are_computed_again(make_space, tmp_path, exporting, told):
    rows = launched(make_space(sweep=[BLOCK]), tmp_path)
    (trial,) = rows[rows.recovery == "reconstruct"].trial_id
    file = tmp_path / "tiny" / ARTIFACTS / trial / "block-2.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    _, done = exporting(trial, tmp_path)
    assert any("damaged" in text for text in told)
    assert done.recomputed is not None


def forged(folder: Path, trial: str, **changes: Any) -> None:
    """Changes the row of a trial."""
    from raysweep.results.reader import trial_rows

    row = trial_rows(folder)[trial] | changes
    names = [name.removeprefix("perplexity_") for name in row if name.startswith("perplexity_")]
    write_rows(folder, row, [], names)
    assert pq.read_table(folder / "trials" / f"{trial}.parquet").num_rows == 1


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, True),
        ({"factor": 1 + 1e-9}, False),  # to the bit, where all else is equal
        ({"factor": 1 + 1e-3, "torch_version": "2.0.0"}, True),
        ({"factor": 1 + 1e-3, "threads": None}, True),
        ({"factor": 1 + 1e-2, "torch_version": "2.0.0"}, False),
    ],
)
def test_what_is_computed_again_must_be_what_the_row_says(make_space, tmp_path, exporting, changes, passes):
    rows = launched(make_space(sweep=[BLOCK], execution={"keep": "none"}), tmp_path)
    row = rows[rows.recovery == "reconstruct"].iloc[0]
    value = row.perplexity * changes.pop("factor", 1.0)
    forged(tmp_path / "tiny", row.trial_id, perplexity=value, perplexity_test=value, **changes)
    if passes:
        assert "its perplexity and that of the row are" in str(
            exporting(row.trial_id, tmp_path)[1].recomputed
        )
        return
    with pytest.raises(RaysweepError, match="nothing was written") as refused:
        exporting(row.trial_id, tmp_path)
    assert refused.value.exit_status == 1
    assert not list(tmp_path.glob("*out-*"))


def test_what_has_changed_since_is_refused_by_name(make_space, space_dict, tmp_path, tiny_llama, tiny_text):
    model, text = tmp_path / "model", tmp_path / "text"
    shutil.copytree(tiny_llama, model)
    shutil.copytree(tiny_text, text)
    space_dict["model"]["path"], space_dict["calibration"]["dataset"] = str(model), str(text)
    rows = launched(make_space(sweep=[BLOCK], execution={"keep": "none"}), tmp_path / "storage")
    (trial,) = rows[rows.recovery == "reconstruct"].trial_id
    shutil.copy(text / "test.parquet", text / "train.parquet")
    with pytest.raises(UsageError, match="calibration text, or its tokenizer, has changed"):
        export(trial, tmp_path / "out", storage=tmp_path / "storage")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(UsageError, match="not the one that was pruned"):
        export(trial, tmp_path / "out", storage=tmp_path / "storage")
    assert not (tmp_path / "out").exists()


def test_trials_without_weights_are_refused(make_space, tmp_path, exporting):
    rows = launched(make_space(sweep=[BLOCK | {"learning_rate": 1e30}]), tmp_path).set_index("recovery")
    with pytest.raises(UsageError, match=r"failed: .*not finite"):
        exporting(rows.loc["reconstruct"].trial_id, tmp_path)
    with pytest.raises(UsageError, match="is the dense model"):
        exporting(rows.loc["dense"].trial_id, tmp_path)


def test_outputs_that_hold_something_else_are_refused_and_earlier_exports_replaced(make_space, tmp_path):
    space = make_space(sweep=[BLOCK | {"learning_rate": [0.01, 0.02]}], execution={"keep": "all"})
    rows = launched(space, tmp_path)
    one, other = rows[rows.recovery == "reconstruct"].trial_id
    output = tmp_path / "deep" / "out"
    export(one, output, storage=tmp_path, dtype="bfloat16")
    export(one, output, storage=tmp_path)
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.float32
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(UsageError, match="an export of another trial"):
        export(other, output, storage=tmp_path)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"also holds notes\.txt"):
        export(one, output, storage=tmp_path)
    (output / "notes.txt").unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thing").write_text("mine")
    for place, message in ((tmp_path / "mine", "is not empty"), (tmp_path / "mine" / "thing", "no folder")):
        with pytest.raises(UsageError, match=message):
            export(one, place, storage=tmp_path)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    (tmp_path / "empty").mkdir()
    export(one, tmp_path / "empty", storage=tmp_path)
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_mount_point_and_a_full_disk_are_refused_and_nothing_is_left(make_space, tmp_path, small_disk):
    rows = launched(make_space(sweep=[BLOCK]), tmp_path)
    (trial,) = rows[rows.recovery == "reconstruct"].trial_id
    with pytest.raises(UsageError, match="is a mount point"):
        export(trial, small_disk, storage=tmp_path)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(free - (64 << 10)))  # room for folders, for no model
    with pytest.raises(StorageError, match="cannot be written"):
        export(trial, small_disk / "out", storage=tmp_path)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_trial_on_the_second_of_several_data_sets_is_computed_again(
    make_space, space_dict, tmp_path, tiny_text, exporting
):
    """Validation text comes from the first, which a space of this trial alone would not know."""
    other = tmp_path / "other"
    shutil.copytree(tiny_text, other)
    train = pd.read_parquet(other / "train.parquet")
    train.iloc[::-1].to_parquet(other / "train.parquet")
    space_dict["calibration"]["dataset"] = [space_dict["calibration"]["dataset"], str(other)]
    rows = launched(make_space(sweep=[KINDS["none"], BLOCK], execution={"keep": "none"}), tmp_path)
    pruned = rows[rows.recovery != "dense"]
    assert len(pruned) == 4
    for trial in pruned.trial_id:
        assert "equal to the bit" in str(exporting(trial, tmp_path)[1].recomputed)


def test_rounded_weights_are_measured(make_space, tmp_path, exporting):
    space = make_space(sweep=[BLOCK])
    rows = launched(space, tmp_path)
    row = rows[rows.recovery == "reconstruct"].iloc[0]
    output, done = exporting(row.trial_id, tmp_path, dtype="bfloat16")
    assert done.measured is not None
    assert done.measured["perplexity"] != row.perplexity
    assert done.measured["perplexity"] == pytest.approx(plain_perplexity(output, ids_of(space)), rel=1e-6)
    assert done.measured.keys() == {
        "perplexity",
        "perplexity_test",
        "perplexity_short",
        "validation_perplexity",
    }
    assert f"{done.measured['perplexity']:.4f}" in (output / "README.md").read_text()


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_exported_masks_give_the_same_rows(make_space, tmp_path, exporting, criterion):
    """With the dense model: of the pruned trial, and where the criterion updates nothing of its recovery as well."""
    mask = {"criterion": criterion, "sparsity": 0.5}
    rest = {"recovery": "reconstruct", "granularity": "block", "learning_rate": 0.01}
    space = make_space(sweep=[{"recovery": "none", **mask}, rest | mask], execution={"keep": "all"})
    rows = launched(space, tmp_path).set_index("recovery")
    output, _ = exporting(rows.loc["none"].trial_id, tmp_path)
    mask = {"criterion": f"file:{output}/masks.safetensors"}
    sweep = [{"recovery": "none", **mask}, rest | mask]
    again = launched(make_space(name="again", sweep=sweep), tmp_path).set_index("recovery")
    columns = ["perplexity", "perplexity_short", "validation_perplexity", "realized_sparsity"]
    for recovery in ("none", "reconstruct"):
        assert again.loc[recovery, columns].tolist() == rows.loc[recovery, columns].tolist()


def test_what_is_to_be_kept_never_fails_a_trial(make_space, tmp_path, monkeypatch):
    prune = trials._Run._prune

    def failing(run, name, trial):
        if name.startswith("kept@"):
            raise RuntimeError("out of memory")
        return prune(run, name, trial)

    monkeypatch.setattr(trials._Run, "_prune", failing)
    rows = launched(make_space(sweep=[KINDS["none"]], execution={"keep": "all"}), tmp_path)
    assert (rows.status == "finished").all()
    assert kept_ids(tmp_path / "tiny") == set()


def test_a_kept_trial_of_which_a_file_is_gone_is_computed_again(make_space, tmp_path, exporting, told):
    rows = launched(make_space(sweep=[KINDS["none"]], execution={"keep": "all"}), tmp_path)
    row = rows[rows.recovery == "none"].iloc[0]
    whole, _ = exporting(row.trial_id, tmp_path)
    (artifact_folder(tmp_path / "tiny", row.trial_id) / "block-1.safetensors").unlink()
    again, done = exporting(row.trial_id, tmp_path)
    assert done.recomputed is not None
    assert any("block-1.safetensors is not there" in text for text in told)
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["adamw", "sparsegpt", "retrain"])
def test_an_exported_folder_starts_another_sweep_with_its_zeros(make_space, tmp_path, exporting, kind):
    rows = launched(make_space(sweep=[KINDS[kind]]), tmp_path)
    row = rows[rows.recovery == KINDS[kind]["recovery"]].iloc[0]
    output, _ = exporting(row.trial_id, tmp_path)
    mask = {"criterion": f"file:{output}/masks.safetensors"}
    further = {"recovery": "reconstruct", **mask, "granularity": "block", "learning_rate": 0.001}
    space = make_space(
        name="more", model={"path": str(output)}, sweep=[{"recovery": "none", **mask}, further]
    )
    more = launched(space, tmp_path).set_index("recovery")
    assert more.loc["dense"].perplexity == pytest.approx(row.perplexity, rel=1e-6)
    assert more.loc["none"].perplexity == more.loc["dense"].perplexity
    assert more.loc["reconstruct"].realized_sparsity == row.realized_sparsity


def test_a_trial_of_an_earlier_space_is_exported_once_that_is_launched_again(make_space, tmp_path, exporting):
    parts = {"sweep": [KINDS["none"]], "execution": {"keep": "none"}}
    earlier = make_space(**parts)
    rows = launched(earlier, tmp_path)
    trial = rows[rows.recovery == "none"].iloc[0].trial_id
    fewer = [entry.model_dump() | {"max_windows": 2} for entry in earlier.evaluation.perplexity]
    launched(make_space(**parts, evaluation={"perplexity": fewer}), tmp_path)
    with pytest.raises(UsageError, match="Launch what it was measured by under this name again"):
        exporting(trial, tmp_path)
    launched(earlier, tmp_path)  # nothing is left to run
    exporting(trial, tmp_path)


def test_trials_that_a_study_chose_or_that_left_the_space(make_space, tmp_path, exporting):
    search = {"algorithm": "optuna", "num_samples": 2, "compare_within": ["recovery"]}
    sweep = [BLOCK | {"learning_rate": {"loguniform": [0.001, 0.01]}}]
    rows = launched(make_space(sweep=sweep, search=search, execution={"keep": "none"}), tmp_path)
    launched(make_space(sweep=[KINDS["none"]], execution={"keep": "none"}), tmp_path)
    for trial in rows[rows.recovery == "reconstruct"].trial_id:
        assert "equal to the bit" in str(exporting(trial, tmp_path)[1].recomputed)


def test_the_plan_counts_what_is_kept(make_space, tmp_path):
    """More than there is, but not by much: norms and biases that nothing changes."""
    for keep in ("none", "best", "all"):
        space = make_space(execution={"keep": keep})
        prepared = prepare_launch(space, tmp_path / keep / "tiny", "cpu")
        (model,) = prepared.models
        planned = prepared.kept_bytes(model, keep)
        launched(space, tmp_path / keep)
        files = list((tmp_path / keep / "tiny" / ARTIFACTS).rglob("*.safetensors"))
        headers = 8000 * len(files)
        there = sum(file.stat().st_size for file in files)
        assert there - headers <= planned <= 1.2 * there + headers
        assert (planned == 0) == (keep == "none")


def test_the_tolerance_is_that_of_the_contract():
    assert recomputing.TOLERANCE == 0.005


@pytest.mark.long
@pytest.mark.parametrize("model", ["embedded", "stories260K"])
def test_every_kind_of_real_models_reloads_with_the_perplexity_of_its_row(
    make_space, tmp_path, exporting, told, request, model
):
    path, text = "builtin:pystdlib", "builtin:pystdlib"
    if model != "embedded":
        data = request.getfixturevalue("shared") / "data"
        path, text = str(data / "models" / model), str(data / "text" / "tinystories")
    entry = {"name": "test", "dataset": text, "sequence_length": 64, "max_windows": 8}
    space = make_space(
        model={"path": path},
        calibration={"dataset": text, "num_samples": 8, "sequence_length": 64},
        evaluation={"perplexity": [entry]},
        sweep=list(KINDS.values()),
        execution={"keep": "all"},
    )
    rows = launched(space, tmp_path)
    assert (rows.status == "finished").all(), rows.error.dropna().tolist()
    pruned = rows[rows.recovery != "dense"]
    assert len(pruned) == len(KINDS)
    for row in pruned.to_dict("records"):
        output, done = exporting(row["trial_id"], tmp_path, dtype="float32")
        assert done.recomputed is None
        assert plain_perplexity(output, ids_of(space)) == pytest.approx(row["perplexity"], rel=1e-6)
        masks = load_file(output / "masks.safetensors")
        pruned_ones = [mask for mask in masks.values() if mask.dtype == torch.uint8]
        share = check_zeros(output) / sum(mask.numel() for mask in pruned_ones)
        assert share == pytest.approx(row["realized_sparsity"])
        assert row["pattern"] != "2:4" or all((mask.view(-1, 4).sum(1) == 2).all() for mask in pruned_ones)
    shutil.rmtree(tmp_path / "tiny" / ARTIFACTS)
    _, done = exporting(pruned.iloc[-1].trial_id, tmp_path, dtype="float32")
    assert "This trial was not kept, so it is computed again" in told
    assert "equal to the bit" in str(done.recomputed)


@pytest.mark.long
def test_the_embedded_model_over_ray(tmp_path, told):
    """Its checkpoint is in bfloat16: the row's perplexity comes back in float32, the checkpoint's own rounds."""
    from raysweep.config.space import SearchSpace
    from raysweep.config.spaces import resolve_space

    sweep = [KINDS["none"], BLOCK | {"learning_rate": 1e-3}, KINDS["2:4"] | {"learning_rate": 1e-3}]
    data = SearchSpace.from_yaml(resolve_space("quickstart"), ["execution.keep=all"]).to_dict() | {
        "sweep": sweep
    }
    space = SearchSpace.from_dict(data)
    rows = launch(space, storage=tmp_path, address="local")
    assert (rows.status == "finished").all(), rows.error.dropna().tolist()
    ids = prepare(space, "cpu")[0].evaluation["pystdlib"].input_ids
    for number, row in enumerate(rows[rows.recovery != "dense"].to_dict("records")):
        output = tmp_path / f"float32-{number}"
        assert export(row["trial_id"], output, storage=tmp_path, dtype="float32").measured is None
        assert plain_perplexity(output, ids) == pytest.approx(row["perplexity"], rel=1e-6)
        check_zeros(output)
        done = export(row["trial_id"], tmp_path / f"own-{number}", storage=tmp_path)
        assert done.dtype == "bfloat16"
        assert (done.measured is None) == (row["recovery"] == "none")  # what is only pruned is not rounded
        shown = (done.measured or row)["perplexity"]
        assert plain_perplexity(tmp_path / f"own-{number}", ids) == pytest.approx(shown, rel=1e-6)
    (last,) = rows[rows.pattern == "2:4"].trial_id
    shutil.rmtree(tmp_path / "quickstart" / ARTIFACTS)
    done = export(last, tmp_path / "again", storage=tmp_path, dtype="float32", tell=told.append)
    assert "equal to the bit" in str(done.recomputed)
