"""Where things wait: the fastest placement that fits, within what a space says."""

from __future__ import annotations

import pytest

from raysweep.cluster.nodes import Node
from raysweep.errors import CapacityError
from raysweep.reconstruction.placement import DEVICE, DISK, FILES, HOST
from raysweep.shards.plan import ShardPlan, host_bytes, make_plan
from raysweep.shards.stores import ON_CPUS, ON_GPUS, Stores
from tests.shards.test_plan import GIB, WORK, model

LARGE = model(blocks=24, hidden=1024, ffn=4096)


def plan_of(memory: int, gpu: int = 0, stores: Stores | None = None) -> ShardPlan:
    node = Node(2, int(gpu > 0), memory, gpu)
    return make_plan(LARGE, [node], WORK, "float32", shards=1, concurrent_trials=1, stores=stores)


def plan_or_none(memory: int) -> ShardPlan | None:
    try:
        return plan_of(memory)
    except CapacityError:
        return None


def test_less_memory_means_slower_places_until_nothing_fits():
    seen, memory = [], 64 * GIB
    while (plan := plan_or_none(memory)) is not None:
        assert host_bytes(plan) <= memory
        seen.append(plan.placement)
        memory = host_bytes(plan) - 1
    assert [place for place in ON_CPUS if place in seen] == list(dict.fromkeys(seen))
    assert seen[0].activations == HOST
    assert (seen[-1].weights, seen[-1].activations) == (FILES, DISK)


def test_a_small_gpu_streams_what_its_host_holds():
    large, small = (plan_of(256 * GIB, gpu).placement for gpu in (80 * GIB, 2 * GIB))
    assert large == ON_GPUS[0]
    assert (small.weights, small.activations, small.statistics) == (HOST, HOST, HOST)
    plan = plan_of(256 * GIB, 2 * GIB)
    assert plan.memory[0].device < 2 * GIB < plan_of(256 * GIB, 80 * GIB).memory[0].device


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_space_says_holds_in_every_placement(device):
    stores = Stores("disk", "disk", "anew", 3, "there")
    (only,) = stores.placements(device)
    assert (only.weights, only.trials, only.activations, only.statistics) == (FILES, DISK, DISK, "anew")
    assert (only.every, only.halves) == (3, False)
    assert only.scratch is not None
    assert only.scratch.is_absolute()
    every = Stores(activations="disk").placements(device)
    assert len(every) > 1
    assert {placement.activations for placement in every} == {DISK}


def test_on_cpus_the_device_and_the_host_are_one_place():
    for weights in ("device", "host"):
        placements = Stores(weights, "device", weights).placements("cpu")
        assert {(p.weights, p.activations, p.statistics) for p in placements} == {(DEVICE, HOST, DEVICE)}
