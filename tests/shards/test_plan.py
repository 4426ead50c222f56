"""Plans: ranges, reserved resources, and refusals that name what would fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysweep.cluster.nodes import Node
from raysweep.errors import CapacityError
from raysweep.model.shape import BlockShape, ModelShape
from raysweep.shards.group_info import TRIAL_CPUS
from raysweep.shards.memory import Workload, shard_memory
from raysweep.shards.plan import even_ranges, make_plan

GIB = 1 << 30
WORK = Workload(
    texts=((64, 256), (16, 256)),
    evaluation_tokens=256,
    batch_size=2,
    masks=4,
    halves=True,
    matrices=False,
    recovery=True,
    concurrent_trials=1,
)


def model(blocks: int = 6, hidden: int = 256, ffn: int = 640, vocabulary: int = 4096) -> ModelShape:
    linears = {"up": (ffn, hidden), "down": (hidden, ffn), "qkv": (2 * hidden, hidden), "o": (hidden, hidden)}
    parameters = sum(outputs * inputs for outputs, inputs in linears.values()) + 2 * hidden
    shapes = tuple(BlockShape({f"{k}.{n}": s for n, s in linears.items()}, parameters) for k in range(blocks))
    return ModelShape(shapes, hidden, vocabulary, vocabulary * hidden, 512, "float32", "bfloat16")


@given(blocks=st.integers(1, 80), shards=st.integers(1, 80))
def test_ranges_cover_every_block_once_and_differ_by_at_most_one(blocks, shards):
    shards = min(blocks, shards)
    ranges = even_ranges(blocks, shards)
    assert [index for start, stop in ranges for index in range(start, stop)] == list(range(blocks))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)  # the last shard has the head as well


@pytest.mark.parametrize(
    ("cpus", "shards", "threads"), [(2, 1, 1), (2, 2, 1), (2, 3, 1), (16, 4, 3), (1, 1, 1), (8, 2, 4)]
)
def test_shards_leave_room_for_the_processes_of_trials(cpus, shards, threads):
    plan = make_plan(model(), [Node(cpus, 0, 64 * GIB)], WORK, "float32", shards=shards, threads=threads)
    assert 0 < plan.cpus <= threads
    assert plan.cpus * shards + plan.concurrent_trials * TRIAL_CPUS <= cpus
    assert plan.cpus < 1 or plan.cpus == int(plan.cpus)  # Ray refuses 1.5 CPUs
    assert plan.shares_cores == (shards * threads > cpus)


def test_automatic_shards_fill_the_cores_or_the_gpus_but_never_split_a_block():
    assert make_plan(model(), [Node(2, 0, 64 * GIB)], WORK, "float32").shards == 2
    assert make_plan(model(3), [Node(16, 0, 64 * GIB)], WORK, "float32").shards == 3
    gpus = make_plan(
        model(), [Node(16, 2, 64 * GIB, 80 * GIB), Node(16, 2, 64 * GIB, 80 * GIB)], WORK, "bfloat16"
    )
    assert (gpus.shards, gpus.device, gpus.gpus) == (4, "cuda", 1.0)


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        ([Node(2, 0, 64 * GIB)], {"shards": 7}, "the model has 6 blocks"),
        ([Node(8, 1, 64 * GIB, 80 * GIB)], {"shards": 2}, "2 shards need 2 GPUs"),
        ([Node(2, 0, GIB // 2)], {}, "of host memory"),
        ([Node(8, 1, 64 * GIB, 1 << 20)], {}, "of device memory"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(nodes, options, message):
    with pytest.raises(CapacityError, match=message) as refused:
        make_plan(model(), nodes, WORK, "float32", **options)
    assert refused.value.remedy or refused.value.allowed


def test_memory_grows_with_what_it_is_made_of():
    base = shard_memory(model(), 0, 3, "float32", WORK)
    wider = shard_memory(model(), 0, 4, "float32", WORK)
    half = shard_memory(model(), 0, 3, "bfloat16", WORK)
    assert wider.weights > base.weights
    assert wider.statistics > base.statistics
    assert half.weights * 2 == base.weights
    assert half.activations * 2 == base.activations
    one_sample = 256 * 256 * 4 * (4 + 3)  # a boundary per block and one more, and one within each block
    assert base.activations == 80 * one_sample
