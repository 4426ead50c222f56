"""Tasks of lm-eval on the dense models and kept trials of a sweep, once its trials have ended: `task_<name>`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raysweep.cluster.nodes import Node
from raysweep.errors import CapacityError, RaysweepError, StorageError, first_line
from raysweep.launching.prepared import Launch
from raysweep.launching.runners import Runner
from raysweep.launching.task_job import Places, Scores, TaskJob, working_bytes
from raysweep.model.tasks import TaskSet
from raysweep.results.artifacts import artifact_folder, kept_trials
from raysweep.results.schema import PERPLEXITY_PREFIX, TASK_PREFIX
from raysweep.results.writer import write_trial_row
from raysweep.shards.memory import PROCESS_BYTES
from raysweep.shards.plan import format_bytes
from raysweep.sweep.prepare import PreparedModel

Row = Mapping[str, Any]


def kept_weights(sweep: Path) -> dict[str, Path]:
    """Of the kept trials of a sweep, by trial_id, the folders with their weights by block."""
    return {kept.trial_id: artifact_folder(sweep, kept.trial_id) for kept in kept_trials(sweep)}


def task_jobs(prepared: Launch, weights: Mapping[str, Path]) -> list[TaskJob]:
    """What is left to measure: of finished rows of the dense models and of kept trials the tasks whose columns are
    missing, or were filled from another version of a task or its documents.

    weights: of the kept trials, by trial_id, the folders with their weights by block
    """
    if prepared.tasks is None:
        return []
    jobs = []
    for trial_id, row in prepared.rows.items():
        is_dense = row.get("recovery") == "dense"
        model = _model_of(prepared, row)
        if row["status"] != "finished" or model is None or not (is_dense or trial_id in weights):
            continue
        missing = prepared.tasks.only(_missing(prepared.tasks, row))
        if missing.names:
            folder = None if is_dense else weights[trial_id]
            jobs.append(_job(prepared, model, trial_id, folder, missing))
    return jobs


def measure_tasks(
    prepared: Launch,
    weights: Mapping[str, Path],
    runner: Runner,
    nodes: Sequence[Node],
    tell: Callable[[str], None],
) -> None:
    """Measures what is left and puts it into the rows, each as soon as it is known.

    tell: hears how far it has come. Raises RaysweepError, once all are through, where some could not be measured.
    """
    jobs, failures = task_jobs(prepared, weights), _without_weights(prepared, weights)
    if not jobs and not failures:
        return
    where = places(prepared.models, nodes)
    done = 0
    if jobs:
        tell(f"Measuring tasks of {_models(len(jobs))}")
    for job, found in runner.measure(jobs, where) if jobs else ():
        done += 1
        if isinstance(found, Exception):
            failures.append(f"{job.label}: {first_line(found)}")
            continue
        try:
            _write(prepared, job, found)
        except StorageError:
            raise
        except RaysweepError as error:
            failures.append(f"{job.label}: {first_line(error)}")
            continue
        tell(f"Measured tasks of {done} of {_models(len(jobs))}")
    if failures:
        raise RaysweepError(
            f"tasks of {_models(len(failures))} could not be measured; the same command tries again\n  "
            + "\n  ".join(failures)
        )


def _without_weights(prepared: Launch, weights: Mapping[str, Path]) -> list[str]:
    """Where every trial is to be measured, those that have no weights on storage to be measured with, and that."""
    if prepared.tasks is None or not prepared.space.tasks_of_all:
        return []
    found = []
    for trial in prepared.trials:
        row = prepared.rows.get(trial.trial_id, {})
        waits = row.get("status") == "finished" and not trial.trial.is_dense
        if waits and trial.trial_id not in weights and _missing(prepared.tasks, row):
            found.append(f"{trial.label}: its weights are not on storage (any more)")
    return found


def places(models: Sequence[PreparedModel], nodes: Sequence[Node]) -> Places:
    """Where models can be measured. Raises CapacityError where the largest fits on no node."""
    needed = max(working_bytes(model.shape, model.dtype) for model in models)
    most = max(node.gpus for node in nodes)
    if most:
        room = min(node.gpu_bytes for node in nodes if node.gpus)
        gpus = math.ceil(needed / room) if room else 1
        if gpus > most:
            raise CapacityError(
                f"tasks need a whole model on one node: {format_bytes(needed)}, which {gpus} GPUs hold, and no node "
                f"has more than {most}",
                remedy="Leave evaluation.tasks out, or choose a smaller dtype.",
            )
        return Places(gpus, sum(node.gpus // gpus for node in nodes), needed)
    needed += PROCESS_BYTES
    each = [int(node.memory_bytes // needed) if node.memory_bytes else 1 for node in nodes]
    if not any(each):
        raise CapacityError(
            f"tasks need a whole model in memory: {format_bytes(needed)}, which no node has",
            remedy="Leave evaluation.tasks out, or choose a smaller dtype.",
        )
    return Places(0, sum(each), needed)


def _model_of(prepared: Launch, row: Row) -> PreparedModel | None:
    """The model of the sweep that a row is of, also where a study has chosen its trial."""
    mine = (row.get("model_hash"), row.get("dtype"))
    return next((model for model in prepared.models if (model.model_hash, model.dtype) == mine), None)


def _missing(tasks: TaskSet, row: Row) -> list[str]:
    """Those whose column is null, or of other contents than the task has now."""
    try:
        known: dict[str, Any] = json.loads(row.get("tasks") or "{}")
    except ValueError:
        known = {}
    return [
        name
        for name in tasks.names
        if row.get(f"{TASK_PREFIX}{name}") is None or known.get(name, {}).get("hash") != tasks.hashes[name]
    ]


def _job(
    prepared: Launch, model: PreparedModel, trial_id: str, weights: Path | None, tasks: TaskSet
) -> TaskJob:
    execution = prepared.space.execution
    labels = {trial.trial_id: trial.label for trial in model.trials}
    return TaskJob(
        trial_id,
        labels.get(trial_id, trial_id),
        replace(model.source, path=model.source.portable_path),
        model.dtype,
        weights,
        tasks,
        execution.task_batch_size,
        execution.threads_per_worker,
    )


def _write(prepared: Launch, job: TaskJob, scores: Scores) -> None:
    """Puts scores into the row, which nobody else writes by now. A trial has one job, so that its row is as it was."""
    row = prepared.rows[job.trial_id]
    known = json.loads(row.get("tasks") or "{}")
    told = {name: score.told() | {"hash": job.tasks.hashes[name]} for name, score in scores.items()}
    columns = {f"{TASK_PREFIX}{name}": score.value for name, score in scores.items()}
    row = row | columns | {"tasks": json.dumps(known | told, sort_keys=True)}
    names, tasks = (
        [name.removeprefix(prefix) for name in row if name.startswith(prefix)]
        for prefix in (PERPLEXITY_PREFIX, TASK_PREFIX)
    )
    write_trial_row(
        prepared.folder, row, names, [*tasks, *(t for t in prepared.space.evaluation.tasks if t not in tasks)]
    )


def _models(number: int) -> str:
    return f"{number} model{'s' * (number != 1)}"
