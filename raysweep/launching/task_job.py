"""One model and the tasks that it is measured on: travels to the process that does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from raysweep.model.checkpoint import ModelSource
from raysweep.model.shape import ModelShape
from raysweep.model.tasks import TaskScore, TaskSet, score_tasks
from raysweep.model.tokenizer import load_tokenizer
from raysweep.shards.memory import SIZES

WORKING = 1.25  # of a model's weights while it runs: activations and logits of a batch; assumption

Scores = dict[str, TaskScore]
"""By task."""


def working_bytes(shape: ModelShape, dtype: str) -> int:
    """What a whole model takes while it is measured on tasks."""
    return int((shape.parameters + shape.vocabulary_parameters) * SIZES[dtype] * WORKING)


@dataclass(frozen=True)
class Places:
    """Where models are measured on tasks.

    gpus: that each takes, 0 = CPUs;  at_once: models that are measured at a time;  memory: bytes that the largest takes
    """

    gpus: int
    at_once: int
    memory: int


@dataclass(frozen=True)
class TaskJob:
    """The tasks that one model is still to be measured on.

    trial_id: whose row gets the columns;  weights: the folder with its weights by block, None of the dense model
    """

    trial_id: str
    label: str
    source: ModelSource
    dtype: str
    weights: Path | None
    tasks: TaskSet
    batch_size: int
    threads: int

    def run(self) -> Scores:
        """Loads the model onto the devices of this process, and measures it."""
        import torch

        from raysweep.model.whole import load_whole, spread

        gpus = torch.cuda.device_count()
        if not gpus:
            torch.set_num_threads(self.threads)
        device = torch.device("cuda" if gpus == 1 else "cpu")
        model = load_whole(self.source, self.dtype, device, self.weights)
        if gpus > 1:
            model = spread(model)
        tokenizer = load_tokenizer(self.source.path, self.source.revision, self.source.trust_remote_code)
        return score_tasks(model, tokenizer, self.tasks, self.batch_size)


def run_job(job: TaskJob) -> Scores:
    """As other processes call it."""
    return job.run()


def run_here(jobs: Sequence[TaskJob]) -> Iterator[tuple[TaskJob, Scores | Exception]]:
    """One after another in this process; what one raises stands in its place."""
    for job in jobs:
        try:
            yield job, job.run()
        except Exception as error:  # whatever it was, the others are measured
            yield job, error
