"""The workers of Ray Train: they start once, and retrain one model after another, all of them together."""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from raysweep.baseline.job import RetrainJob
from raysweep.baseline.plan import RetrainPlan
from raysweep.errors import NumericalError, RaysweepError, StorageError, first_line
from raysweep.shards.retrained import TRAINING, fail, is_over, write_json

ATTEMPTS = 3  # of one job whose workers end before it does; then it has failed and the others go on
_REMEMBERING = type(functools.cache(len))  # what `lru_cache` makes of a function
_ATTEMPT, _ERRORS = "attempt.json", "error-*.json"


def forget_attempts(job: RetrainJob) -> None:
    """Attempts count within one launch: one that was interrupted says nothing against the job."""
    for file in (job.folder / _ATTEMPT, job.folder / TRAINING, *job.folder.glob(_ERRORS)):
        file.unlink(missing_ok=True)


def retrain_on_ray(jobs: Sequence[RetrainJob], plan: RetrainPlan, storage: Path, name: str) -> None:
    """Runs all jobs that are not over, on a connected cluster. A job that fails says so in its folder.

    A worker that ends is replaced, and the job in hand goes on at its last checkpoint.
    storage, name: Ray Train keeps its own state in storage/name
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        _work,
        train_loop_config={"jobs": list(jobs), "threads": plan.threads},
        scaling_config=ScalingConfig(
            num_workers=plan.workers, use_gpu=plan.use_gpu, resources_per_worker={"CPU": plan.cpus}
        ),
        torch_config=TorchConfig(backend="nccl" if plan.use_gpu else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=ATTEMPTS * len(jobs)),
        ),
    )
    _beside_the_main_thread(trainer.fit)


def _beside_the_main_thread(call: Callable[[], object]) -> None:
    """Waits for the call in a thread of its own: in the main one Train takes Ctrl-C for itself."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def retrain_here(jobs: Sequence[RetrainJob], threads: int) -> None:
    """The same without Ray: one worker, in this process."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    if not dist.is_initialized():  # and it stays so: DeepSpeed holds on to the first group that it sees
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    try:
        _retrain_all(jobs, device)
    finally:
        del os.environ["LOCAL_RANK"]
        torch.set_num_threads(before)


def _work(config: dict[str, Any]) -> None:
    """What every worker does."""
    import ray.train.torch
    import torch

    torch.set_num_threads(config["threads"])
    _retrain_all(config["jobs"], ray.train.torch.get_device())


def _retrain_all(jobs: Sequence[RetrainJob], device: Any) -> None:
    import torch.distributed as dist

    # DeepSpeed compiles a part of itself on CPUs, with the `ninja` that lies beside this Python.
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )
    for job in jobs:
        if _agreed(_begin(job) if dist.get_rank() == 0 else False, device):
            _attempt(job, device)
            _let_go()


def _let_go() -> None:
    """Frees what a job has left, beside which the next one would have to find room.

    An engine is a circle of objects, which waits for Python to look for such. With ZeRO 3 DeepSpeed keeps the model of
    every one for the life of the process: in a list, and as the argument of calls whose answers it remembers.
    """
    from deepspeed.runtime.zero import parameter_offload

    getattr(parameter_offload, "FWD_MODULE_STACK", []).clear()
    remembering = [each for each in gc.get_objects() if type(each) is _REMEMBERING]
    for each in remembering:
        if str(each.__module__).startswith("deepspeed."):
            each.cache_clear()
    gc.collect()


def _begin(job: RetrainJob) -> bool:
    """Whether the job is to be run; counts attempts, and gives up on one that ended its workers too often."""
    if is_over(job.folder):
        return False
    record = job.folder / _ATTEMPT
    attempts = int(json.loads(record.read_text(encoding="utf-8"))["attempts"]) if record.exists() else 0
    if attempts >= ATTEMPTS:
        reasons = [json.loads(file.read_text(encoding="utf-8"))["error"] for file in job.folder.glob(_ERRORS)]
        why = reasons[0] if reasons else "killed by the system for their memory, perhaps"
        fail(job.folder, RaysweepError(f"its workers ended {attempts} times before it did: {why}"))
        return False
    write_json(record, {"attempts": attempts + 1})
    return True


def _attempt(job: RetrainJob, device: Any) -> None:
    import torch
    import torch.distributed as dist

    from raysweep.baseline.retrain import retrain

    try:
        with _quiet():
            retrain(job, device)
    except NumericalError as error:  # on all ranks
        if dist.get_rank() == 0:
            fail(job.folder, error)
    except StorageError:  # not the trial's failure: Ray Train tries again, and then the sweep ends
        raise
    except (torch.cuda.OutOfMemoryError, RaysweepError) as error:  # would come again
        fail(job.folder, error)
        if dist.get_world_size() > 1:  # others may wait for this rank: all start anew
            raise
    except Exception as error:  # Ray Train starts the workers again; the reason is kept should it come again
        reason = f"{type(error).__name__}: {first_line(error)}"
        write_json(job.folder / _ERRORS.replace("*", str(dist.get_rank())), {"error": reason})
        raise


def _agreed(value: bool, device: Any) -> bool:
    """What the first rank says."""
    import torch
    import torch.distributed as dist

    shared = torch.tensor(int(value), device=device)
    dist.broadcast(shared, src=0)
    return bool(shared)


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed tells every step of its start, and torch what DeepSpeed should call otherwise."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found nothing better
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        yield
