"""Tasks of lm-eval: one accuracy in a sweep's row, in `raysweep evaluate` and in lm-eval's own command."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'raysweep[tasks]'")

from raysweep.config.space import SearchSpace
from raysweep.errors import RaysweepError, UsageError
from raysweep.launching import task_job
from raysweep.launching.launch import launch
from raysweep.model.block_files import write_block
from raysweep.model.tasks import find_tasks
from raysweep.results.artifacts import artifact_folder, kept_trials
from raysweep.results.reader import load_results, load_units
from raysweep.results.state import SweepState
from raysweep.sweep.prepare import prepare

NAME = "tiny_choice"
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


def write_documents(file: Path, seed: int, number: int = 48) -> None:
    rng = random.Random(seed)
    words = ["ka", "lo", "miren", "tusa", "vel", "nodi", "par"]
    rows = [
        {
            "question": " ".join(rng.choices(words, k=5)),
            "choices": [" ".join(rng.choices(words, k=rng.randint(1, 3))) for _ in range(3)],
            "label": rng.randrange(3),
        }
        for _ in range(number)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a multiple-choice task over a local file."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "own"
    folder.mkdir()
    write_documents(folder / "documents.jsonl", seed=0)
    (folder / f"{NAME}.yaml").write_text(TASK.replace("DATA", str(folder / "documents.jsonl")))
    return folder


@pytest.fixture
def make_tasks_space(make_space, own_tasks):
    """Dense and one pruned trial, measured on the task."""

    def make(**changes: Any):
        pruned = [{"recovery": "none", "criterion": "magnitude", "sparsity": 0.5}]
        evaluation = {"tasks": [NAME], "tasks_include": str(own_tasks)} | changes
        return make_space(sweep=pruned, evaluation=evaluation)

    return make


def plain_command(folder: Path, own_tasks: Path, output: Path) -> dict[str, float]:
    """What lm-eval's own command says of a model folder."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", NAME, "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--include_path", str(own_tasks)]
    run = subprocess.run(
        [*command, "--batch_size", "1", "--output_path", str(output)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (file,) = output.rglob("results*.json")
    found: dict[str, float] = json.loads(file.read_text())["results"][NAME]
    return found


def evaluated(raysweep_command: list[str], cwd: Path) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-m", "raysweep", "evaluate", *raysweep_command, "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)["tasks"][NAME]
    return found


@pytest.mark.long
def test_one_accuracy_in_row_evaluate_and_plain_command(make_tasks_space, own_tasks, tiny_llama, tmp_path):
    rows = launch(make_tasks_space(), storage=tmp_path / "storage", in_process=True)
    (dense,) = rows[rows.recovery == "dense"].to_dict("records")
    plain = plain_command(tiny_llama, own_tasks, tmp_path / "plain")
    mine = evaluated([str(tiny_llama), "--tasks", NAME, "--include", str(own_tasks)], tmp_path)
    assert dense[f"task_{NAME}"] == mine["value"] == plain["acc,none"]
    assert 0 < plain["acc,none"] < 1
    assert mine["values"] == {"acc,none": plain["acc,none"], "acc_norm,none": plain["acc_norm,none"]}
    assert mine["errors"]["acc,none"] == pytest.approx(plain["acc_stderr,none"], rel=1e-9)
    assert mine["documents"] == 48


@pytest.mark.long
def test_over_ray_the_scores_are_those_of_this_process(make_tasks_space, tmp_path):
    found = {}
    for name, options in {"ray": {"address": "local"}, "here": {"in_process": True}}.items():
        rows = launch(make_tasks_space(), storage=tmp_path / name, **options)
        found[name] = rows.set_index("trial_id")[f"task_{NAME}"]
        assert found[name].notna().all()
    assert found["ray"].to_dict() == found["here"].to_dict()


def replace_kept(storage: Path, trial_id: str, tiny_llama: Path, target: Path) -> None:
    """Puts other weights in place of a kept trial's, and writes the same as a model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    weights = {
        name: torch.randn_like(tensor) * 0.3
        for name, tensor in model.state_dict().items()
        if name.startswith("model.layers.") and name.endswith("proj.weight")
    }
    for block in range(4):
        mine = {name: tensor for name, tensor in weights.items() if f"layers.{block}." in name}
        masks = {
            name.removesuffix(".weight"): torch.ones_like(t, dtype=torch.uint8) for name, t in mine.items()
        }
        write_block(artifact_folder(storage / "tiny", trial_id), block, mine | masks)
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(target)


@pytest.mark.long
def test_kept_trials_are_measured_and_nothing_else_is_run_again(
    make_tasks_space, own_tasks, tiny_llama, tmp_path, monkeypatch
):
    storage = tmp_path / "storage"
    first = launch(make_tasks_space(tasks=[]), storage=storage, in_process=True)
    assert f"task_{NAME}" not in first
    (pruned,) = first[first.recovery == "none"].trial_id
    replace_kept(storage, pruned, tiny_llama, tmp_path / "model")
    measured: list[str] = []
    run_here = task_job.TaskJob.run
    monkeypatch.setattr(task_job.TaskJob, "run", lambda job: measured.append(job.trial_id) or run_here(job))
    rows = launch(make_tasks_space(), storage=storage, in_process=True).set_index("trial_id")
    assert set(measured) == set(first.trial_id)
    assert set(rows.index) == set(first.trial_id)  # a task of kept trials is no part of their identity
    assert (rows.started_at == first.set_index("trial_id").started_at.loc[rows.index]).all()
    assert len(load_units("tiny", storage)) > 0
    mine = evaluated([str(tmp_path / "model"), "--tasks", NAME, "--include", str(own_tasks)], tmp_path)
    assert rows[f"task_{NAME}"][pruned] == mine["value"]
    told = json.loads(rows.tasks[pruned])[NAME]
    assert (told["metric"], told["documents"]) == ("acc,none", 48)

    measured.clear()
    launch(make_tasks_space(), storage=storage, in_process=True)
    assert measured == []  # it is all there
    write_documents(own_tasks / "documents.jsonl", seed=1)
    again = launch(make_tasks_space(), storage=storage, in_process=True).set_index("trial_id")
    assert set(measured) == set(first.trial_id)  # of other documents
    assert json.loads(again.tasks[pruned])[NAME]["hash"] != told["hash"]


@pytest.mark.long
@pytest.mark.parametrize("keep", ["none", "best"])
def test_every_trial_waits_for_its_tasks_where_all_are_to_be_measured(make_tasks_space, tmp_path, keep):
    space = make_tasks_space(tasks_on="all")
    plain = make_tasks_space()
    space = replace(space, execution=space.execution.model_copy(update={"keep": keep}))
    pruned = [{"recovery": "none", "criterion": ["magnitude", "random"], "sparsity": 0.5}]
    space = SearchSpace.from_dict(space.to_dict() | {"sweep": pruned})
    rows = launch(space, storage=tmp_path, in_process=True)
    assert len(rows) == 3
    assert rows[f"task_{NAME}"].notna().all()
    assert len(list(kept_trials(tmp_path / "tiny"))) == (1 if keep == "best" else 0)
    others = {one.trial_id for model in prepare(plain, "cpu") for one in model.trials}
    assert others.isdisjoint(rows.trial_id)  # what every trial is measured on is part of its identity


@pytest.mark.long
def test_what_an_earlier_launch_kept_stays_when_tasks_have_been_measured(make_tasks_space, tmp_path):
    space = make_tasks_space(tasks=[])
    kept = replace(space, execution=space.execution.model_copy(update={"keep": "all"}))
    launch(kept, storage=tmp_path, in_process=True)
    before = {one.trial_id for one in kept_trials(tmp_path / "tiny")}
    space = make_tasks_space(tasks_on="all")
    space = replace(space, execution=space.execution.model_copy(update={"keep": "none"}))
    launch(space, storage=tmp_path, in_process=True)
    assert {one.trial_id for one in kept_trials(tmp_path / "tiny")} == before
    assert before


@pytest.mark.long
def test_what_cannot_be_measured_fails_no_trial_and_is_tried_again(make_tasks_space, tmp_path, monkeypatch):
    def broken(job):
        raise RaysweepError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(task_job.TaskJob, "run", broken)
        with pytest.raises(
            RaysweepError, match=r"(?s)tasks of 2 models could not be measured.*dense: no luck"
        ):
            launch(make_tasks_space(), storage=tmp_path, in_process=True)
    rows = load_results("tiny", tmp_path)
    assert set(rows.status) == {"finished"}
    assert f"task_{NAME}" not in rows
    assert SweepState.read(tmp_path / "tiny").state == "failed"
    assert not (tmp_path / "tiny" / "unfinished").exists()
    rows = launch(make_tasks_space(), storage=tmp_path, in_process=True)
    assert rows[rows.recovery == "dense"][f"task_{NAME}"].notna().all()
    assert SweepState.read(tmp_path / "tiny").state == "finished"


@pytest.mark.long
@pytest.mark.parametrize(("keep", "left"), [("none", 0), ("best", 1), ("all", 2)])
def test_weights_that_wait_for_tasks_are_kept_as_the_last_launch_says(
    make_tasks_space, tmp_path, monkeypatch, keep, left
):
    """The first one leaves them waiting, because a task fails."""
    space = make_tasks_space(tasks_on="all")
    pruned = [{"recovery": "none", "criterion": ["magnitude", "random"], "sparsity": 0.5}]
    document = space.to_dict() | {"sweep": pruned}

    def run(keep: str) -> None:
        document["execution"]["keep"] = keep
        launch(SearchSpace.from_dict(document), storage=tmp_path, in_process=True)

    with monkeypatch.context() as patch:
        patch.setattr(task_job.TaskJob, "run", lambda job: 1 / 0)
        with pytest.raises(RaysweepError, match="could not be measured"):
            run("none")
    assert [one.waits for one in kept_trials(tmp_path / "tiny")] == [True, True]
    run(keep)
    assert [one.waits for one in kept_trials(tmp_path / "tiny")] == [False] * left
    run("none")
    assert len(list(kept_trials(tmp_path / "tiny"))) == left  # what another launch kept stays


def test_tasks_are_hashed_by_what_they_ask_wherever_it_lies(own_tasks, tmp_path):
    found = find_tasks([NAME], str(own_tasks))
    other = tmp_path / "moved"
    other.mkdir()
    write_documents(other / "renamed.jsonl", seed=0)
    (other / "x.yaml").write_text(TASK.replace("DATA", str(other / "renamed.jsonl")))
    assert find_tasks([NAME], str(other)).hashes == found.hashes
    (other / "x.yaml").write_text(
        TASK.replace("DATA", str(other / "renamed.jsonl")).replace("{{question}}", "Q: {{question}}")
    )
    assert find_tasks([NAME], str(other)).hashes != found.hashes


def test_a_task_without_documents_is_refused(own_tasks):
    (own_tasks / "documents.jsonl").unlink()
    with pytest.raises(UsageError, match=f"task '{NAME}' cannot be read"):
        find_tasks([NAME], str(own_tasks))


@pytest.mark.long
def test_an_unknown_task_is_refused_with_the_nearest_name(make_tasks_space, tmp_path):
    with pytest.raises(UsageError, match="unknown task 'tiny_choise'") as refused:
        launch(make_tasks_space(tasks=["tiny_choise"]), storage=tmp_path / "none", in_process=True)
    assert refused.value.nearest == NAME
    assert "evaluation.tasks" in str(refused.value)
    assert not (tmp_path / "none").exists()
