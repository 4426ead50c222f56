"""Retrains one model on this worker, beside those of the other ranks: a DeepSpeed engine, step by step."""

# S samples, B samples of a step, T tokens

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from raysweep.baseline.extensions import load_extensions
from raysweep.baseline.job import CHECKPOINT, RetrainJob
from raysweep.baseline.network import (
    MaskedLowRank,
    begin_training,
    linears_of,
    loss_elements,
    total_loss,
    without_dropout,
)
from raysweep.baseline.profile import profile_sample
from raysweep.errors import NumericalError
from raysweep.model.block_files import read_block, write_block
from raysweep.model.linears import find_blocks
from raysweep.model.shard import ModelShard
from raysweep.reconstruction.device_peak import reset_peak
from raysweep.reconstruction.knowledge import Stopwatch
from raysweep.reconstruction.training import TrainingRecipe
from raysweep.results.folders import OUTSIDE
from raysweep.shards.memory import SIZES, retraining_bytes
from raysweep.shards.retrained import Retrained
from raysweep.shards.retrained import begin_training as say_that_training_begins


def retrain(job: RetrainJob, device: torch.device) -> Retrained:
    """Runs a job to its end, or goes on where its last checkpoint was; every rank calls it at once.

    Raises NumericalError, on all ranks, when weights are not finite.
    """
    retraining = _Retraining(job, device)
    try:
        result = retraining.run()
    except Exception as error:
        # Where this rank alone fails, the others wait for it, and to end what it has begun could take for ever.
        if isinstance(error, NumericalError) or retraining.world == 1:
            retraining.engine.destroy()
        raise
    retraining.engine.destroy()  # its hooks hold on to it where Python's collector does not see them
    return result


class _Retraining:
    def __init__(self, job: RetrainJob, device: torch.device) -> None:
        self.job, self.trial, self.device = job, job.trial, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        began = time.perf_counter()
        if device.type == "cuda":  # the peak counts from the loading on
            reset_peak(device)
            self.bytes_before = torch.cuda.memory_allocated(device)
        self.ids_ST = torch.from_numpy(np.load(job.ids))
        self.recipe = TrainingRecipe.of(job.trial)
        self.model = self._load()
        self.prefix, self.blocks = find_blocks(self.model)
        self.teacher = self._load() if job.trial.loss == "distillation" else None
        masks = self._start()
        self.profile = profile_sample(self.model, self.teacher, job.trial, self.ids_ST.shape[1])
        without_dropout(self.model, bool(job.trial.gradient_checkpointing))
        trained = begin_training(self.model, job.trial, masks)
        self.trainable_parameters = sum(parameter.numel() for parameter in trained)
        self.engine = self._engine(trained)
        self.first_step, self.seconds, self.wall_seconds, self.losses = 0, 0.0, 0.0, [0.0, 0.0]
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self._resume()
        self.start_seconds = time.perf_counter() - began

    def run(self) -> Retrained:
        if self.rank == 0:
            say_that_training_begins(self.job.folder)
        watch, clock = Stopwatch(self.device), time.perf_counter()
        steps = list(self.recipe.steps(len(self.ids_ST)))
        for number in range(self.first_step, len(steps)):
            loss = self._step(steps[number].rows, steps[number].factor)
            if number == 0:
                self.losses[0] = float(loss)
            if number + 1 == len(steps):
                self.losses[1] = float(loss)
            elif (number + 1) % self.job.checkpoint_steps == 0:
                self._took(watch, clock)
                self._check(number)
                self._save(number + 1)
                watch, clock = Stopwatch(self.device), time.perf_counter()
        self._took(watch, clock)
        peak_bytes = self._peak_bytes()
        self._check(len(steps) - 1)
        result = Retrained(
            steps=len(steps),
            workers=self.world,
            seconds=self._over_ranks(self.seconds, dist.ReduceOp.SUM),
            wall_seconds=self._over_ranks(self.wall_seconds, dist.ReduceOp.MAX),
            start_seconds=self._over_ranks(self.start_seconds, dist.ReduceOp.MAX),
            training_flops=self.profile.flops * len(self.ids_ST) * self.recipe.epochs,
            trainable_parameters=self.trainable_parameters,
            peak_bytes=int(self._over_ranks(peak_bytes, dist.ReduceOp.MAX)),
            loss_first=self.losses[0],
            loss_last=self.losses[1],
        )
        self._export()
        if self.rank == 0:
            result.write(self.job.folder)
            shutil.rmtree(self._checkpoint, ignore_errors=True)
        dist.barrier()
        return result

    def _took(self, watch: Stopwatch, clock: float) -> None:
        self.seconds += watch.seconds()
        self.wall_seconds += time.perf_counter() - clock

    # Before the first step

    def _load(self) -> Any:
        """The dense model, tied weights tied."""
        model = ModelShard.load(self.job.source, dtype=self.job.dtype, device=self.device).model
        model.tie_weights()
        return model.eval()

    def _start(self) -> dict[str, Tensor]:
        """Puts the start weights in place; returns the masks by linear, bool in the layout of the weight."""
        linears, masks = linears_of(self.model), dict[str, Tensor]()
        for index in range(len(self.blocks)):
            for name, tensor in read_block(self.job.start, index).items():
                if name in linears:
                    masks[name] = tensor.bool()
                else:
                    with torch.no_grad():
                        self.model.get_parameter(name).copy_(tensor)
        return masks

    def _engine(self, trained: list[nn.Parameter]) -> Any:
        if self.device.type == "cpu":
            load_extensions()
        import deepspeed

        optimizer = torch.optim.AdamW(trained, lr=self.recipe.learning_rate, weight_decay=0.0)
        engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=optimizer,
            config=engine_config(self.job, self.world, self.device),
        )
        return engine

    # Steps

    def _step(self, rows_B: Tensor, factor: float) -> Tensor:
        """One step; returns its loss, the mean over its elements.

        Its samples are cut into as many pieces as there are ranks and micro-batches; where one is empty, another sample
        stands in with weight 0, so that none is dropped and every rank takes part.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * factor
        accumulation, pieces = self.trial.gradient_accumulation or 1, self._pieces(rows_B)
        elements = loss_elements(self.trial, len(rows_B), self.ids_ST.shape[1])
        total = torch.zeros((), device=self.device)
        for micro in range(accumulation):
            piece_B = pieces[micro * self.world + self.rank]
            weight = 1.0 if len(piece_B) else 0.0
            ids_BT = self.ids_ST[piece_B if len(piece_B) else rows_B[:1]].to(self.device)
            loss = weight * total_loss(self.engine, self.teacher, ids_BT) / elements
            self.engine.backward(loss * (accumulation * self.world))  # the engine takes the mean over both
            self.engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        self.finite &= torch.isfinite(total)  # looked at now and then: to look is to wait for the device
        return total

    def _pieces(self, rows_B: Tensor) -> tuple[Tensor, ...]:
        """A step's samples by micro-batch and rank."""
        return rows_B.tensor_split((self.trial.gradient_accumulation or 1) * self.world)

    def _check(self, number: int) -> None:
        """Raises NumericalError on all ranks when a loss, or a weight of any, is not finite."""
        weights = all(bool(torch.isfinite(parameter).all()) for parameter in self.engine.module.parameters())
        finite = weights and bool(self.finite)
        if self._over_ranks(0.0 if finite else 1.0, dist.ReduceOp.MAX):
            raise NumericalError(
                f"loss or weights are not finite after step {number + 1} at learning rate "
                f"{self.recipe.learning_rate:g}: lower it"
            )

    def _over_ranks(self, value: float, operation: Any) -> float:
        shared = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, op=operation)
        return float(shared)

    def _peak_bytes(self) -> int:
        """The most that the device's allocator had handed out, beyond what it had before; on a CPU what the memory
        model says of this model's own numbers."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.bytes_before
        largest = max(map(len, self._pieces(torch.arange(min(self.recipe.batch_size, len(self.ids_ST))))))
        return retraining_bytes(
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            trained=self.trainable_parameters,
            size=SIZES[self.job.dtype],
            stage=self.trial.zero_stage or 0,
            workers=self.world,
            saved=self.profile.saved_bytes * largest,
            teacher=self.teacher is not None,
        )

    # Checkpoints and results

    @property
    def _checkpoint(self) -> Path:
        return self.job.folder / CHECKPOINT

    def _save(self, step: int) -> None:
        """Every rank writes its part; the earlier checkpoint goes once the new one is complete."""
        times = {"seconds": self.seconds, "wall_seconds": self.wall_seconds}
        state = {"step": step, "losses": self.losses} | times
        self.engine.save_checkpoint(str(self._checkpoint), tag=f"step-{step}", client_state=state)
        dist.barrier()
        if self.rank == 0:
            for earlier in self._checkpoint.glob("step-*"):
                if earlier.name != f"step-{step}":
                    shutil.rmtree(earlier, ignore_errors=True)

    def _resume(self) -> None:
        if not (self._checkpoint / "latest").exists():
            return
        path, state = self.engine.load_checkpoint(str(self._checkpoint))
        if path is not None:
            self.first_step, self.losses = state["step"], list(state["losses"])
            self.seconds, self.wall_seconds = state["seconds"], state["wall_seconds"]

    def _export(self) -> None:
        """Writes what was trained, by block and under the names of the dense model; removed weights are zero."""
        for index, block in enumerate(self.blocks):
            with self._gathered(block):
                if self.rank == 0:
                    write_block(self.job.folder, index, _merged(block, f"{self.prefix}.{index}"))
        if self.trial.trainable != "all":
            return
        outside = [
            (name, parameter)
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if not name.startswith(f"{self.prefix}.")
        ]
        with self._gathered(*(parameter for _, parameter in outside)):
            if self.rank == 0:
                write_block(self.job.folder, OUTSIDE, dict(outside))

    @contextmanager
    def _gathered(self, *owners: nn.Module | nn.Parameter) -> Iterator[None]:
        """Parameters as a whole; ZeRO 3 keeps a part of each on every rank."""
        import deepspeed

        parameters = dict.fromkeys(  # tied ones once
            parameter
            for owner in owners
            for parameter in (owner.parameters() if isinstance(owner, nn.Module) else [owner])
        )
        with (
            deepspeed.zero.GatheredParameters(list(parameters), enabled=self.trial.zero_stage == 3),
            torch.no_grad(),
        ):
            yield


def engine_config(job: RetrainJob, world: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's settings. On CPUs float32 or bfloat16 as the model's dtype says, without its own compiled Adam."""
    trial = job.trial
    accumulation = trial.gradient_accumulation or 1
    micro = max(1, (trial.batch_size or 1) // (accumulation * world))
    zero: dict[str, Any] = {"stage": trial.zero_stage or 0}
    if trial.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": trial.max_grad_norm or 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": job.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }


def _merged(block: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The block's parameters by the full names that they have in the dense model, low-rank changes merged."""
    low_rank = {name: module for name, module in block.named_modules() if isinstance(module, MaskedLowRank)}
    tensors: dict[str, Tensor] = {}
    for name, parameter in block.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner not in low_rank:
            tensors[f"{prefix}.{name}"] = parameter
        elif leaf == "weight":
            tensors[f"{prefix}.{name}"] = low_rank[owner].merged()
        elif leaf == "bias":
            tensors[f"{prefix}.{name}"] = parameter
    return tensors
