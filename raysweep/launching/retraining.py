"""What retraining needs of the shards, and what shards need of it: start weights, jobs, and cleaning up."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.baseline.job import RetrainJob
from raysweep.baseline.plan import RetrainPlan, plan_retraining
from raysweep.baseline.workers import forget_attempts
from raysweep.cluster.nodes import Node
from raysweep.config.sections import ExecutionConfig
from raysweep.errors import RaysweepError, ShardLostError, StorageError
from raysweep.results.folders import RETRAINING, unfinished_folder
from raysweep.shards.group_info import ShardGroup
from raysweep.shards.retrained import (
    RetrainingFolders,
    fail,
    failure_in,
    is_over,
    is_start,
    is_training,
)
from raysweep.shards.trial import write_start
from raysweep.sweep.identified import SweepTrial
from raysweep.sweep.prepare import PreparedModel

LOOK_EVERY_S = 0.5  # at which jobs are over, to tell about them


def retrain_plan(
    model: PreparedModel, trials: Sequence[SweepTrial], nodes: Sequence[Node], execution: ExecutionConfig
) -> RetrainPlan | None:
    """The plan for the trials of a model that are retrained; None where there are none. Raises CapacityError."""
    lengths = {
        trial.trial: model.data[trial.data_hash].sequence_length
        for trial in trials
        if trial.data_hash is not None
    }
    if not lengths:
        return None
    workers = None if execution.retrain_workers == "auto" else execution.retrain_workers
    return plan_retraining(lengths, model.shape, model.dtype, nodes, workers)


def is_retrained(trial: SweepTrial) -> bool:
    return trial.start_id is not None


class Retraining:
    """The trials of one model that are retrained, in their folders within the sweep's."""

    def __init__(self, folder: Path, model: PreparedModel, trials: Sequence[SweepTrial], steps: int) -> None:
        self.folder, self.model, self.trials, self.checkpoint_steps = folder, model, list(trials), steps

    def forget_failures(self) -> None:
        """What failed before is tried once more."""
        for trial in self.trials:
            if failure_in(self._folders(trial).weights) is not None:
                shutil.rmtree(self._folders(trial).weights)

    def lacks_start(self, trial: SweepTrial) -> bool:
        """Whether the shards must still write what the trial starts from."""
        folders = self._folders(trial)
        return not is_over(folders.weights) and not is_start(folders.start)

    def starts(self, trials: Sequence[SweepTrial]) -> dict[str, Path]:
        """Folders of the start weights that some of the trials lack, by their identity: a trial of the sweep that
        makes them anyway writes them there."""
        return {
            str(trial.start_id): self._folders(trial).start for trial in trials if self.lacks_start(trial)
        }

    def write_starts(
        self, group: ShardGroup, trials: Sequence[SweepTrial], tell: Callable[[str], None]
    ) -> None:
        """Has the shards write the start weights of those of the trials that lack them. One that cannot be pruned
        has failed."""
        for trial in filter(self.lacks_start, trials):
            folders = self._folders(trial)
            tell(f"Start weights of {trial.label}")
            name = f"{trial.start_id}@start"
            try:
                unfinished = unfinished_folder(self.folder, str(trial.start_id))
                arguments = (
                    group,
                    trial.trial,
                    name,
                    trial.number,
                    folders.start,
                    trial.trial_id,
                    unfinished,
                )
                write_start(*arguments, trial.label)
            except (ShardLostError, StorageError):
                raise
            except RaysweepError as error:  # a criterion of the user's own, or numbers that are not finite
                fail(folders.weights, error)

    def jobs(self) -> list[RetrainJob]:
        """The retrainings that are not over, with their token ids on storage."""
        jobs = [self._job(trial) for trial in self.trials if not is_over(self._folders(trial).weights)]
        for job in jobs:
            forget_attempts(job)
        return jobs

    def clean_up(self, done: Container[str]) -> None:
        """Removes what has served its purpose. done: identities of trials that will not run again"""
        folders = {trial: self._folders(trial) for trial in self.trials}
        waiting = [trial for trial in self.trials if trial.trial_id not in done]
        needed = {folder for trial in waiting for folder in (folders[trial].weights, folders[trial].start)}
        for served in {folder for each in folders.values() for folder in (each.weights, each.start)} - needed:
            shutil.rmtree(served, ignore_errors=True)
        with suppress(OSError):  # another model's are still there
            (self.folder / RETRAINING).rmdir()

    def _job(self, trial: SweepTrial) -> RetrainJob:
        folders = self._folders(trial)
        folders.weights.mkdir(parents=True, exist_ok=True)
        ids = folders.weights / "ids.npy"
        np.save(ids, self.model.data[str(trial.data_hash)].input_ids)
        return RetrainJob(
            label=trial.label,
            trial=trial.trial,
            source=replace(self.model.source, path=self.model.source.portable_path),
            dtype=self.model.dtype,
            start=folders.start,
            ids=ids,
            folder=folders.weights,
            checkpoint_steps=self.checkpoint_steps,
        )

    def _folders(self, trial: SweepTrial) -> RetrainingFolders:
        folders = trial.retraining(self.folder)
        if folders is None:
            raise ValueError(f"{trial.label} is not retrained")
        return folders


@contextmanager
def telling(jobs: Sequence[RetrainJob], tell: Callable[[str], None]) -> Iterator[None]:
    """Tells which of the jobs runs, within the context, as their folders show it."""
    ended = threading.Event()

    def look() -> None:
        told: Any = None
        while not ended.wait(LOOK_EVERY_S):
            over = sum(is_over(job.folder) for job in jobs)
            if over == len(jobs):
                continue
            now = (over, is_training(jobs[over].folder))
            if now != told:
                what = "" if now[1] else " (workers, model and engine come first)"
                tell(f"Retraining {over + 1} of {len(jobs)}: {jobs[over].label}{what}")
                told = now

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
