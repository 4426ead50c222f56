"""Retrainings of a small model, on one rank in this process or on several of their own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysweep.baseline.job import RetrainJob
from raysweep.baseline.workers import retrain_here
from raysweep.config.trial import Trial
from raysweep.model.block_files import read_block, write_block
from raysweep.model.checkpoint import ModelSource
from raysweep.model.linears import block_linears, find_blocks
from raysweep.model.shard import ModelShard
from raysweep.shards.retrained import Retrained, failure_in

ROOT = Path(__file__).resolve().parents[2]


def retrain_trial(**fields: Any) -> Trial:
    return Trial(
        **{"recovery": "retrain", "criterion": "wanda", "sparsity": 0.5, "learning_rate": 0.01} | fields
    )


def write_start(model: Path, folder: Path) -> None:
    """Random masks that keep half, and the weights under them."""
    shard = ModelShard.load(ModelSource(str(model), None, False))
    prefix, blocks = find_blocks(shard.model)
    generator = torch.Generator().manual_seed(0)
    for index, block in enumerate(blocks):
        tensors: dict[str, Tensor] = {}
        for name, linear in block_linears(block, f"{prefix}.{index}").items():
            weight = linear.module.get_parameter("weight").detach()
            mask = torch.rand(weight.shape, generator=generator) < 0.5
            tensors |= {name: mask.to(torch.uint8), f"{name}.weight": weight * mask}
        write_block(folder, index, tensors)


def make_job(model: Path, folder: Path, trial: Trial, samples: int = 7, **fields: Any) -> RetrainJob:
    """folder: of everything that belongs to it"""
    start = folder / "start"
    if not start.exists():
        write_start(model, start)
        ids = np.random.default_rng(0).integers(0, 60, (samples, 12))
        np.save(folder / "ids.npy", ids)
    result = folder / f"result-{len(list(folder.glob('result-*')))}"
    result.mkdir()
    settings: dict[str, Any] = {
        "label": "job",
        "trial": trial,
        "source": ModelSource(str(model), None, False),
        "dtype": "float32",
        "start": start,
        "ids": folder / "ids.npy",
        "folder": result,
        "checkpoint_steps": 1000,
    }
    return RetrainJob(**settings | fields)


def run_here(job: RetrainJob) -> Retrained:
    retrain_here([job], threads=1)
    return Retrained.read(job.folder)


def run_on_ranks(jobs: list[RetrainJob], world: int) -> None:
    """Each rank is a process of its own."""
    (jobs[0].folder / "jobs").write_bytes(pickle.dumps(jobs))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "tests.baseline.jobs", str(jobs[0].folder), str(world)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors
    assert not any(failure_in(job.folder) for job in jobs)


def results(job: RetrainJob) -> dict[str, Tensor]:
    """All tensors that it wrote, by full name."""
    parts = [file.stem.removeprefix("block-") for file in sorted(job.folder.glob("block-*.safetensors"))]
    return {name: tensor for part in parts for name, tensor in read_block(job.folder, part).items()}


def start_masks(job: RetrainJob) -> dict[str, Tensor]:
    files = len(list(job.start.glob("block-*.safetensors")))
    tensors = {name: t for index in range(files) for name, t in read_block(job.start, index).items()}
    return {name: tensor.bool() for name, tensor in tensors.items() if f"{name}.weight" in tensors}


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def _rank(folder: Path, world: int, rank: int) -> None:
    import torch.distributed as dist

    from raysweep.baseline.workers import _retrain_all

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    _retrain_all(pickle.loads((folder / "jobs").read_bytes()), torch.device("cpu"))
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
