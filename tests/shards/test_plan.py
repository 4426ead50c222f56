"""Plans: ranges, reserved resources, and refusals that name what would fit."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysweep.cluster.nodes import Node
from raysweep.errors import CapacityError
from raysweep.model.shape import BlockShape, ModelShape
from raysweep.reconstruction.placement import Placement
from raysweep.shards.group_info import TRIAL_CPUS
from raysweep.shards.memory import Workload, shard_memory
from raysweep.shards.plan import (
    KNOWLEDGE_MARGIN,
    even_ranges,
    host_bytes,
    host_bytes_in_one_process,
    make_plan,
)
from raysweep.shards.stores import Stores

GIB = 1 << 30
RESIDENT = Stores("device", "host", "device", "all")
WORK = Workload(
    texts=((64, 256), (16, 256)),
    evaluation_tokens=256,
    batch_size=2,
    masks=4,
    granularities=frozenset({"subblock"}),
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
    assert sizes == sorted(sizes, reverse=True)  # the last shard has a head, the first not always


@pytest.mark.parametrize(
    ("cpus", "shards", "threads"), [(2, 1, 1), (2, 2, 1), (2, 3, 1), (16, 4, 3), (1, 1, 1), (8, 2, 4)]
)
def test_shards_leave_room_for_the_processes_of_trials(cpus, shards, threads):
    plan = make_plan(model(), [Node(cpus, 0, 64 * GIB)], WORK, "float32", shards=shards, threads=threads)
    assert 0 < plan.cpus <= threads
    assert plan.cpus * shards + plan.concurrent_trials * TRIAL_CPUS <= cpus
    assert plan.cpus < 1 or plan.cpus == int(plan.cpus)  # Ray refuses 1.5 CPUs
    assert plan.shares_cores == (shards * threads > cpus)


def test_both_ends_of_the_chain_have_the_head_on_cpus_and_room_for_it():
    shape = model(vocabulary=65536)
    alone = make_plan(shape, [Node(1, 0, 64 * GIB)], WORK, "float32")
    first, middle, last = make_plan(shape, [Node(3, 0, 64 * GIB)], WORK, "float32", shards=3).memory
    assert first.evaluation == last.evaluation == alone.memory[0].evaluation > middle.evaluation
    head = shape.vocabulary_parameters * 4
    assert first.weights == middle.weights + 2 * head == last.weights + head
    on_gpus = make_plan(shape, [Node(8, 2, 64 * GIB, 64 * GIB)], WORK, "bfloat16", shards=2)
    assert on_gpus.heads == {1}
    assert on_gpus.memory[0].evaluation < on_gpus.memory[1].evaluation


def test_automatic_shards_fill_the_cores_or_the_gpus_but_never_split_a_block():
    assert make_plan(model(), [Node(2, 0, 64 * GIB)], WORK, "float32").shards == 2
    assert make_plan(model(3), [Node(16, 0, 64 * GIB)], WORK, "float32").shards == 3
    gpus = make_plan(
        model(), [Node(16, 2, 64 * GIB, 80 * GIB), Node(16, 2, 64 * GIB, 80 * GIB)], WORK, "bfloat16"
    )
    assert (gpus.shards, gpus.device, gpus.gpus) == (4, "cuda", 1.0)


def test_replicas_divide_the_places_and_each_needs_its_memory():
    node = Node(4, 0, 64 * GIB)
    alone, twice = (make_plan(model(), [node], WORK, "float32", shards=2, replicas=count) for count in (1, 2))
    assert host_bytes(twice) == 2 * host_bytes(alone)
    assert twice.memory == alone.memory
    assert (twice.shards, twice.all_shards, twice.cpus) == (2, 4, 0.97)
    assert twice.all_concurrent_trials == 2 * twice.concurrent_trials
    automatic = make_plan(model(), [node], WORK, "float32", replicas=2)
    assert (automatic.shards, automatic.replicas, automatic.shares_cores) == (2, 2, False)
    assert make_plan(model(), [node], WORK, "float32", replicas=3, shards=2).shares_cores
    gpus = make_plan(model(), [Node(16, 5, 64 * GIB, 80 * GIB)], WORK, "bfloat16", replicas=2)
    assert (gpus.shards, gpus.all_shards) == (2, 4)
    little = Node(4, 0, host_bytes(alone) - 1)
    with pytest.raises(CapacityError, match="of host memory"):
        make_plan(model(), [little], WORK, "float32", shards=2, replicas=2, concurrent_trials=3)


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        ([Node(2, 0, 64 * GIB)], {"shards": 7}, "the model has 6 blocks"),
        ([Node(8, 1, 64 * GIB, 80 * GIB)], {"shards": 2}, "2 shards need 2 GPUs"),
        (
            [Node(8, 3, 64 * GIB, 80 * GIB)],
            {"shards": 2, "replicas": 2},
            "2 replicas of 2 shards need 4 GPUs",
        ),
        ([Node(2, 0, 400 << 20)], {}, "of host memory"),
        ([Node(8, 1, 64 * GIB, 1 << 20)], {}, "of device memory"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(nodes, options, message):
    with pytest.raises(CapacityError, match=message) as refused:
        make_plan(model(), nodes, WORK, "float32", **options)
    assert refused.value.remedy or refused.value.allowed


@pytest.mark.parametrize(
    ("cpus", "threads", "shards", "reserved"),
    [
        ((5, 5), 3, 2, 3),  # ten cores, but no node has room for a second shard
        ((6, 3), 3, 3, 2),  # a node full of shards would leave no room for trials
        ((8, 2), 4, 2, 3),
        ((2, 2), 1, 4, 0.95),
        ((1, 3), 2, 1, 2),
    ],
)
def test_a_shard_lies_on_one_node(cpus, threads, shards, reserved):
    nodes = [Node(count, 0, 64 * GIB) for count in cpus]
    plan = make_plan(model(), nodes, WORK, "float32", threads=threads)
    assert (plan.shards, plan.cpus, plan.shares_cores) == (shards, reserved, False)
    assert sum(int((count - TRIAL_CPUS) / plan.cpus) for count in cpus) >= plan.shards


def test_more_shards_than_places_share_cores_where_all_of_them_fit():
    plan = make_plan(model(), [Node(5, 0, 64 * GIB), Node(5, 0, 64 * GIB)], WORK, "float32", 3, 3)
    assert (plan.shares_cores, plan.cpus) == (True, 2)


def host_need(trials: int) -> int:
    """Host bytes of the one-shard plan on a CPU with so many trials in flight, from a node without bounds."""
    plan = make_plan(model(), [Node(1, 0, 0)], WORK, "float32", 1, concurrent_trials=trials)
    return plan.memory[0].total


@pytest.mark.parametrize("fitting", [1, 2, 3])
def test_trials_in_flight_are_lowered_until_they_fit_unless_they_are_given(fitting):
    node, options = Node(1, 0, host_need(fitting)), {"shards": 1, "stores": RESIDENT}
    assert make_plan(model(), [node], WORK, "float32", **options).concurrent_trials == fitting
    assert make_plan(model(), [node], WORK, "float32", concurrent_trials=fitting, **options).memory
    with pytest.raises(CapacityError, match="of host memory"):
        make_plan(model(), [node], WORK, "float32", concurrent_trials=fitting + 1, **options)
    with pytest.raises(CapacityError, match="of host memory"):
        make_plan(model(), [Node(1, 0, host_need(1) - 1)], WORK, "float32", **options)


def test_an_automatic_number_of_shards_is_lowered_until_they_fit():
    """Every shard is a process with libraries of its own, so fewer need less memory in all."""
    node = Node(6, 0, host_need(1))
    assert make_plan(model(), [node], WORK, "float32", stores=RESIDENT).shards == 1
    with pytest.raises(CapacityError, match="of host memory"):
        make_plan(model(), [node], WORK, "float32", shards=2, stores=RESIDENT)
    with pytest.raises(CapacityError, match="of host memory"):
        make_plan(model(), [Node(6, 0, host_need(1) - 1)], WORK, "float32", stores=RESIDENT)


MATRICES = replace(WORK, granularities=frozenset({"subblock", "matrix"}), inputs=True)
BLOCK_INPUTS = (
    64 * 256 * 4 * (256 + 640 + 256 + 256)
)  # calibration tokens, float32, widths of the four inputs


def least_bytes() -> int:
    """What one shard of the model works with when it keeps one block's inputs while another's are made."""
    return shard_memory(model(), 0, 6, "float32", replace(MATRICES, concurrent_trials=1)).total


def test_inputs_of_one_block_are_required_and_of_all_kept_where_memory_is_left():
    masks = 4 * 6 * (2 * 640 * 256 + 3 * 256 * 256) // 8  # one bit a weight
    options = {"shards": 1, "concurrent_trials": 1, "stores": RESIDENT}
    poor = make_plan(model(), [Node(1, 0, least_bytes())], MATRICES, "float32", **options)
    rich = make_plan(model(), [Node(1, 0, 64 * GIB)], MATRICES, "float32", **options)
    middle = make_plan(
        model(), [Node(1, 0, least_bytes() + 4 * BLOCK_INPUTS)], MATRICES, "float32", **options
    )
    kept = [plan.knowledge_bytes - masks - KNOWLEDGE_MARGIN for plan in (poor, middle, rich)]
    assert kept == [BLOCK_INPUTS, 3 * BLOCK_INPUTS, 6 * BLOCK_INPUTS]
    assert [plan.memory[0].kept // BLOCK_INPUTS for plan in (poor, middle, rich)] == [2, 4, 6]
    assert middle.memory[0].total <= least_bytes() + 4 * BLOCK_INPUTS
    with pytest.raises(CapacityError, match="of host memory"):
        make_plan(model(), [Node(1, 0, least_bytes() - 1)], MATRICES, "float32", **options)


def test_a_billion_parameters_at_the_published_calibration_fit_a_large_node():
    shapes = {"q": (2048, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 2048)}
    shapes |= {"gate": (8192, 2048), "up": (8192, 2048), "down": (2048, 8192)}
    blocks = (BlockShape(shapes, sum(outputs * inputs for outputs, inputs in shapes.values())),) * 16
    llama = ModelShape(blocks, 2048, 128256, 128256 * 2048, 131072, "float32", "bfloat16")
    work = replace(MATRICES, texts=((128, 2048), (16, 2048)), evaluation_tokens=2048)
    plan = make_plan(llama, [Node(16, 1, 128 * GIB, 80 * GIB)], work, "bfloat16")
    widest = 2 * 128 * 2048 * (6 * 2048 + 8192)
    assert plan.memory[0].kept >= 2 * widest
    assert plan.memory[0].host <= 128 * GIB


def test_masks_lie_on_the_device():
    more = shard_memory(model(), 0, 3, "float32", replace(WORK, masks=WORK.masks + 1))
    base = shard_memory(model(), 0, 3, "float32", WORK)
    assert more.device - base.device == sum(
        outputs * inputs // 8 for block in model().blocks[:3] for outputs, inputs in block.linears.values()
    )
    assert more.host == base.host


def test_factors_of_gram_matrices_are_kept_where_memory_is_left():
    work = replace(WORK, updated=2, factors=3)
    grams = 4 * sum(i * (i + 1) for _, i in model().blocks[0].linears.values())
    rich = make_plan(model(), [Node(1, 0, 64 * GIB)], work, "float32", shards=1, concurrent_trials=1)
    assert (rich.memory[0].factors, rich.memory[0].kept) == (6 * 3 * grams, 0)
    assert shard_memory(model(), 0, 6, "float32", work).factors == 2 * 3 * grams


def test_where_nobody_knows_what_a_gpu_holds_inputs_are_kept():
    placement = Stores("device", "device", "device", "all")
    plan = make_plan(model(), [Node(8, 1, 64 * GIB, 0)], MATRICES, "bfloat16", shards=1, stores=placement)
    assert (
        plan.memory[0].kept
        == make_plan(
            model(), [Node(8, 1, 64 * GIB, 80 * GIB)], MATRICES, "bfloat16", shards=1, stores=placement
        )
        .memory[0]
        .kept
    )
    assert plan.knowledge_bytes > plan.memory[0].kept > 0


@pytest.mark.parametrize("store", ["device", "host", "disk"])
def test_factors_of_gram_matrices_lie_in_host_memory(store):
    placement = Placement(activations=store)
    few, more = (
        shard_memory(model(), 0, 6, "bfloat16", replace(WORK, factors=factors), False, placement, "cuda")
        for factors in (1, 2)
    )
    grams = 4 * sum(i * (i + 1) for _, i in model().blocks[0].linears.values())
    assert more.host - few.host == 2 * grams
    assert (more.device, more.disk) == (few.device, few.disk)


def test_matrices_on_streams_need_room_for_their_inputs_and_outputs():
    streams = replace(WORK, streams=True, concurrent_trials=2)
    tokens = 80 * 256
    base = shard_memory(model(), 0, 3, "float32", streams).streams
    trained = replace(streams, granularities=frozenset({"matrix"}), outputs=True)
    matrices = shard_memory(model(), 0, 3, "float32", trained).streams
    assert base == 2 * 2 * tokens * 256 * 4
    assert matrices - base == (2 * 640 + 640) * tokens * 4


def test_work_on_gram_matrices_is_no_room_for_knowledge():
    masks = replace(WORK, masks=4, updated=1)
    plan = make_plan(model(), [Node(1, 0, 64 * GIB)], masks, "float32", shards=1, concurrent_trials=1)
    weights = 6 * (2 * 640 * 256 + 3 * 256 * 256)
    assert plan.memory[0].pruning == 36 * 640**2 + 12 * 640 * 256
    assert plan.knowledge_bytes == 4 * weights // 8 + 4 * weights + KNOWLEDGE_MARGIN


def test_a_shard_fits_on_one_node():
    need = host_need(1)
    with pytest.raises(CapacityError, match="of host memory on one node"):
        make_plan(model(), [Node(1, 0, need // 2), Node(1, 0, need - 1)], WORK, "float32", 1, stores=RESIDENT)


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


def test_no_more_trials_are_counted_than_there_are():
    node = [Node(2, 0, 64 * GIB)]
    few, more, unknown = (
        make_plan(model(), node, replace(WORK, most_trials=most), "float32", concurrent_trials=4).memory[0]
        for most in (1, 4, None)
    )
    assert more.trials == unknown.trials == 4 * few.trials > 0


def test_batches_that_pass_together_take_room():
    node = [Node(2, 0, 64 * GIB)]
    resident, files = (
        make_plan(model(), node, WORK, "float32", stores=Stores(weights, "host", "device", "all")).memory[0]
        for weights in ("device", "disk")
    )
    assert files.evaluation == resident.evaluation + 2 * 8 * 2048 * 256 * 4
    few = replace(WORK, most_tokens=5000)
    of_few = make_plan(model(), node, few, "float32", stores=Stores("disk", "host", "device", "all")).memory[
        0
    ]
    assert of_few.evaluation == resident.evaluation + 2 * 5000 * 256 * 4


@pytest.mark.parametrize(
    ("granularity", "span", "weights"),
    [
        ("matrix", 1, 640 * 256),
        ("block", 1, model().blocks[0].parameters),
        ("window:2", 2, 2 * model().blocks[0].parameters),
    ],
)
def test_a_unit_waits_in_host_memory_to_be_written(granularity, span, weights):
    work = replace(WORK, granularities=frozenset({granularity}), span=span, trained_tokens=1 << 20)
    on_cpu = shard_memory(model(), 0, 6, "float32", work)
    assert on_cpu.left == 4 * weights
    on_gpu = shard_memory(model(), 0, 6, "bfloat16", work, device="cuda")
    assert on_gpu.left == 2 * weights
    assert on_gpu.host == on_gpu.process + on_gpu.left + on_gpu.stored
    soon = replace(work, trained_tokens=1 << 17)  # done on a GPU before it could be written
    assert shard_memory(model(), 0, 6, "bfloat16", soon, device="cuda").left == 0
    assert shard_memory(model(), 0, 6, "float32", soon).left == 4 * weights
    across = shard_memory(model(), 0, 1, "float32", work)  # each of its shards writes block by block
    assert across.left == min(4 * weights, 4 * model().blocks[0].parameters)


def test_of_two_blocks_none_is_ever_put_away():
    """Each is the next one of the other, so that all weights of trials stay in hand."""
    placement = Placement("host", "host", "host", "host")
    parameters, masks = model().blocks[0].parameters * 2, 4 * (model().blocks[0].parameters - 2 * 256) // 8
    for trials in (1, 3):
        work = replace(WORK, concurrent_trials=trials)
        of_two, of_three = (
            shard_memory(model(blocks), 0, blocks, "bfloat16", work, placement=placement, device="cuda")
            for blocks in (2, 3)
        )
        assert of_two.trials == 2 * trials * parameters
        assert of_three.trials == 2 * parameters
        grams = of_three.waiting_on_host // 3 - (1 + trials) * parameters - masks
        assert of_two.waiting_on_host == 2 * (parameters + masks + grams)
        assert grams > 0


@pytest.mark.parametrize("span", [1, 6])
def test_one_process_does_one_thing_at_a_time_unless_units_span_its_shards(span):
    plan = make_plan(model(), [Node(2, 0, 64 * GIB)], replace(WORK, span=span), "float32", shards=2)
    first, last = plan.memory
    lasting = [memory.total - memory.process - memory.at_work - memory.heap for memory in plan.memory]
    passing = [memory.at_work + memory.heap for memory in (first, last)]
    at_once = max(passing) if span == 1 else sum(passing)
    assert host_bytes_in_one_process(plan) == first.process + sum(lasting) + at_once
