"""How many workers retrain, what they hold, and refusals that name a setting that works."""

from __future__ import annotations

import pytest

from raysweep.baseline.plan import plan_retraining
from raysweep.cluster.nodes import Node
from raysweep.errors import CapacityError, UsageError
from raysweep.model.shape import BlockShape, ModelShape
from tests.baseline.jobs import retrain_trial

GIB = 1 << 30
SHAPES = {
    "q": (4096, 4096),
    "kv": (2048, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
BLOCK = BlockShape(SHAPES, sum(outputs * inputs for outputs, inputs in SHAPES.values()))
LLAMA = ModelShape((BLOCK,) * 32, 4096, 128256, 2 * 128256 * 4096, 131072, "float32", "bfloat16")


def hosts(gpus: int) -> list[Node]:
    return [Node(64, gpus, 1024 * GIB, 80 * GIB)]


def test_workers_are_as_many_as_batches_can_be_cut_for():
    small = ModelShape((BLOCK,), 4096, 32000, 32000 * 4096, 4096, "float32", "bfloat16")
    for batch, gpus, workers in ((8, 4, 4), (6, 4, 3), (2, 8, 2), (1, 8, 1)):
        plan = plan_retraining({retrain_trial(batch_size=batch): 512}, small, "bfloat16", hosts(gpus), None)
        assert (plan.workers, plan.use_gpu) == (workers, True)
    on_cpus = plan_retraining(
        {retrain_trial(batch_size=4): 512}, small, "float32", [Node(8, 0, 256 * GIB)], None
    )
    assert (on_cpus.workers, on_cpus.threads) == (1, 8)


def test_without_a_compiler_nothing_is_retrained_on_cpus(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="Install g"):
        plan_retraining({retrain_trial(): 64}, LLAMA, "float32", [Node(8, 0, 256 * GIB)], None)


def test_zero_spreads_what_does_not_fit():
    """8B parameters in bfloat16: 16 GB of weights, as many of gradients, 96 GB of moments and masters."""
    full = retrain_trial(batch_size=8, zero_stage=0, gradient_accumulation=1)
    with pytest.raises(CapacityError, match=r"This fits: zero_stage: 3, gradient_accumulation: 8") as caught:
        plan_retraining({full: 2048}, LLAMA, "bfloat16", hosts(2), None)
    assert "zero_stage 0 needs" in caught.value.what
    fits = retrain_trial(
        batch_size=8, zero_stage=3, gradient_accumulation=2, gradient_checkpointing=True, offload="cpu"
    )
    plan = plan_retraining({fits: 2048}, LLAMA, "bfloat16", hosts(4), None)
    assert plan.workers == 4
    assert plan.bytes < 80 * GIB
    lora = retrain_trial(batch_size=1, trainable="lora", gradient_checkpointing=True)
    assert plan_retraining({lora: 2048}, LLAMA, "bfloat16", hosts(1), None).bytes < 40 * GIB


def test_float16_is_not_retrained():
    with pytest.raises(UsageError, match=r"float32 \| bfloat16"):
        plan_retraining({retrain_trial(): 64}, LLAMA, "float16", hosts(1), None)


def test_a_micro_batch_that_does_not_divide_is_refused_with_one_that_does():
    trial = retrain_trial(batch_size=6, gradient_accumulation=3)
    with pytest.raises(CapacityError, match="batch_size: 12, or execution.retrain_workers: 2"):
        plan_retraining({trial: 64}, LLAMA, "bfloat16", hosts(8), 4)
    with pytest.raises(CapacityError, match="there are 2 GPUs"):
        plan_retraining({trial: 64}, LLAMA, "bfloat16", hosts(2), 3)
