"""How many workers retrain, and whether what they hold fits. Refuses with a setting that would work. No torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raysweep.cluster.nodes import Node
from raysweep.config.field_groups import LORA
from raysweep.config.trial import Trial
from raysweep.errors import CapacityError, UsageError
from raysweep.model.shape import ModelShape
from raysweep.shards.memory import PROCESS_BYTES, SIZES, retraining_bytes, saved_activation_bytes
from raysweep.shards.plan import format_bytes

MOST_CPUS_BESIDE_A_GPU = 8  # assumption: AdamW on the host is bound by its memory beyond


@dataclass(frozen=True)
class RetrainPlan:
    """workers: processes, each with a GPU or with `cpus` CPUs and as many threads;  use_gpu: which of them
    bytes: the most that one worker holds, on its device or on a CPU in all
    """

    workers: int
    use_gpu: bool
    cpus: float
    bytes: int

    @property
    def workers_text(self) -> str:
        """In words."""
        return f"{self.workers} worker{'s' * (self.workers > 1)}"

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))


def plan_retraining(
    trials: Mapping[Trial, int], model: ModelShape, dtype: str, nodes: Sequence[Node], workers: int | None
) -> RetrainPlan:
    """The plan for all of `trials`, each with the tokens of a sample. Raises UsageError, or CapacityError.

    workers: None leaves their number to the plan
    """
    if dtype == "float16":
        raise UsageError(
            "retraining in float16 would need its loss scaled",
            where="model.dtype",
            allowed="float32 | bfloat16",
        )
    use_gpu = any(node.gpus for node in nodes)
    places = sum(node.gpus for node in nodes) if use_gpu else max(1, int(sum(node.cpus for node in nodes)))
    pieces = [(trial.batch_size or 1) // (trial.gradient_accumulation or 1) for trial in trials]
    if workers is None:
        number = max(
            w for w in range(1, (places if use_gpu else 1) + 1) if all(each % w == 0 for each in pieces)
        )
    else:
        number = workers
        _check_number(number, places, use_gpu, list(trials))
    cpus = _cpus_of_a_worker(nodes, number, use_gpu)
    if not use_gpu:
        _check_compiler()
    largest = 0
    for trial, tokens in trials.items():
        largest = max(largest, _checked(trial, tokens, model, dtype, nodes, number, use_gpu))
    return RetrainPlan(number, use_gpu, cpus, largest)


def worker_bytes(
    trial: Trial, tokens: int, model: ModelShape, dtype: str, nodes: Sequence[Node], wanted: int | None
) -> tuple[int, int]:
    """How many workers would retrain, and what each would hold where it computes, beside its process; whether that fits
    is not asked.

    tokens: of a sample;  wanted: None leaves the number of workers to the plan
    """
    gpus = sum(node.gpus for node in nodes)
    pieces = (trial.batch_size or 1) // (trial.gradient_accumulation or 1)
    fitting = max(number for number in range(1, max(1, gpus) + 1) if pieces % number == 0)
    workers = fitting if wanted is None else wanted
    held = _bytes(trial, tokens, model, dtype, workers, bool(gpus))
    return workers, held if gpus else held - PROCESS_BYTES


def _cpus_of_a_worker(nodes: Sequence[Node], workers: int, use_gpu: bool) -> float:
    """Beside a GPU half its share of the node's, which offloaded steps and loading use: others want some."""
    if use_gpu:
        each = min(node.cpus / node.gpus / 2 for node in nodes if node.gpus)
        return float(max(1, min(int(each), MOST_CPUS_BESIDE_A_GPU)))
    return float(max(1, int(max(node.cpus for node in nodes)) // workers))


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UsageError(
            f"retraining on CPUs needs a C++ compiler, with which DeepSpeed builds a part of itself: no {compiler}",
            remedy="Install g++ (Debian, Ubuntu: apt-get install g++) on every node.",
        )


def _check_number(number: int, places: int, use_gpu: bool, trials: Sequence[Trial]) -> None:
    if number > places:
        raise CapacityError(
            f"execution.retrain_workers is {number}, and there are {places} {'GPUs' if use_gpu else 'CPUs'}",
            allowed=f"1 to {places}, or auto",
        )
    for trial in trials:
        batch, pieces = trial.batch_size or 1, trial.gradient_accumulation or 1
        if batch % (number * pieces):
            fitting = max(w for w in range(1, number + 1) if batch % (w * pieces) == 0)
            raise CapacityError(
                f"batch_size {batch} cannot be cut into micro-batches for {number} workers and gradient_accumulation "
                f"{pieces}",
                allowed=f"a batch_size that {number * pieces} divides",
                remedy=f"For example batch_size: {-(-batch // (number * pieces)) * number * pieces}, or "
                f"execution.retrain_workers: {fitting}.",
            )


def _checked(
    trial: Trial,
    tokens: int,
    model: ModelShape,
    dtype: str,
    nodes: Sequence[Node],
    workers: int,
    use_gpu: bool,
) -> int:
    """Bytes of a worker where it computes. Raises CapacityError, with a setting that fits if there is one."""
    if use_gpu:
        there = min((node.gpu_bytes for node in nodes if node.gpus), default=0)
    else:
        there = max(node.memory_bytes for node in nodes) // workers
    need = _bytes(trial, tokens, model, dtype, workers, use_gpu)
    if not there or need <= there:
        return need
    words = f"retraining with zero_stage {trial.zero_stage} needs {format_bytes(need)} a worker"
    for change in _changes(trial):
        if _bytes(trial.model_copy(update=change), tokens, model, dtype, workers, use_gpu) <= there:
            settings = ", ".join(f"{name}: {str(value).lower()}" for name, value in change.items())
            raise CapacityError(
                f"{words}, and there are {format_bytes(there)}", remedy=f"This fits: {settings}."
            )
    raise CapacityError(
        f"{words}, and there are {format_bytes(there)}",
        remedy="Use more workers, trainable: lora, a smaller dtype, or shorter sequences.",
    )


def _changes(trial: Trial) -> list[dict[str, object]]:
    """Other settings with the same numbers, from the one that costs least time."""
    stages = [stage for stage in range(4) if stage > (trial.zero_stage or 0)]
    batch = trial.batch_size or 1
    changes: list[dict[str, object]] = [{"zero_stage": stage} for stage in stages]
    changes += [{"gradient_accumulation": batch}] if batch > (trial.gradient_accumulation or 1) else []
    changes += [{"gradient_checkpointing": True}]
    changes += [{"zero_stage": 3, "gradient_accumulation": batch, "gradient_checkpointing": True}]
    changes += [
        {"zero_stage": 3, "offload": "cpu", "gradient_accumulation": batch, "gradient_checkpointing": True}
    ]
    return changes


def _bytes(trial: Trial, tokens: int, model: ModelShape, dtype: str, workers: int, use_gpu: bool) -> int:
    """What one worker holds: on a GPU, or on a CPU with its process."""
    pieces = workers * (trial.gradient_accumulation or 1)
    samples = -(-(trial.batch_size or 1) // pieces)
    parameters = sum(block.parameters for block in model.blocks) + model.vocabulary_parameters
    saved = saved_activation_bytes(model, samples * tokens, SIZES[dtype], bool(trial.gradient_checkpointing))
    held = retraining_bytes(
        parameters=parameters,
        trained=_trained(trial, model, parameters),
        size=SIZES[dtype],
        stage=trial.zero_stage or 0,
        workers=workers,
        saved=saved,
        teacher=trial.loss == "distillation",
        offload=trial.offload == "cpu" and use_gpu,
    )
    return held + (0 if use_gpu else PROCESS_BYTES)


def _trained(trial: Trial, model: ModelShape, parameters: int) -> int:
    """Parameters that are trained; norms beside low-rank changes are not worth counting."""
    if trial.trainable in LORA:
        return sum((trial.lora_rank or 0) * sum(shape) for shape in model.linears.values())
    if trial.trainable == "all":
        return parameters
    return sum(block.parameters for block in model.blocks)
