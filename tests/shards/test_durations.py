"""Time of a sweep from rates, on numbers that can be added up by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raysweep.cluster.nodes import Node
from raysweep.launching.outlook import Outlook, RetrainingInstead, total_seconds
from raysweep.model.shape import BlockShape, ModelShape
from raysweep.shards.costs import DENSE_PASS, HEAD, WORKERS, Piece, Work
from raysweep.shards.durations import (
    BUSY_SHARE,
    IN_PROCESS_START,
    LOCKING_BYTES_S,
    RAY_START,
    RAY_START_WORK,
    RETRAINING_START_S,
    TRIAL,
    Rates,
    durations,
)
from raysweep.shards.memory import Workload
from raysweep.shards.plan import make_plan
from raysweep.shards.stores import Stores

BLOCK = BlockShape({"0.up": (8, 4)}, 40)
MODEL = ModelShape((BLOCK,) * 4, 4, 16, 64, 32, "float32", "bfloat16")
WORK = Workload(((2, 8),), 8, 2, masks=1, granularities=frozenset({"block"}), concurrent_trials=1)
IMPORTING = 2.0
TRIAL_S = TRIAL * IMPORTING
RATES = Rates(
    {"forward": 2.0, "forward alone": 1.0, "import": IMPORTING, "head": 3.0, "step: block": 5.0}, weights=32
)
NONE, BLOCKS = ("none", None), ("reconstruct", "block")


def took(*pieces: Piece, trials: int, shards: int = 2, at_once: int = 2, replicas: int = 1, cpus: int = 4):
    node = Node(cpus, 0, 64 << 30)
    plan = make_plan(MODEL, [node], WORK, "float32", shards, concurrent_trials=at_once, replicas=replicas)
    return durations(Work(pieces, {}, 1, trials), MODEL, plan, RATES, 2, node.cpus)


def test_the_busiest_shard_counts():
    found = took(Piece(DENSE_PASS, -1, "forward", 10), Piece(NONE, 0, "forward", 10), trials=1)
    assert found.dense_pass == 2 * 10 * 2.0
    assert found.trials == 2 * 10 * 2.0 / BUSY_SHARE
    assert found.kinds[NONE] == found.trials
    assert found.trials_busy == 4 * 10 * 2.0


def test_what_goes_from_shard_to_shard_in_turn_waits_unless_other_trials_are_in_flight():
    pieces = [Piece(BLOCKS, trial, "step: block", 10, in_turn=True) for trial in range(2)]
    assert took(*pieces, trials=2, at_once=1).trials == 2 * (4 * 10 * 5.0 + TRIAL_S)
    assert took(*pieces, trials=2, at_once=2).trials == 2 * 2 * 10 * 5.0 / BUSY_SHARE


def test_both_ends_share_the_head():
    assert took(Piece(NONE, 0, "head", 10, place=HEAD), trials=1).trials == 10 * 3.0 / 2 / BUSY_SHARE


def test_replicas_share_the_trials_and_shards_the_cores():
    pieces = [Piece(NONE, trial, "forward", 1000) for trial in range(4)]
    alone = took(*pieces, trials=4).trials
    assert took(*pieces, trials=4, replicas=2).trials == pytest.approx(alone / 2, rel=1e-3)
    assert took(*pieces, trials=4, cpus=1).trials == pytest.approx(alone * 2, rel=1e-3)


def test_retraining_uses_its_workers():
    found = took(Piece(("retrain", None), 0, "step: block", 100, place=WORKERS), trials=1)
    assert found.retraining == RETRAINING_START_S + 4 * 100 * 5.0 / 2


def test_locking_host_memory_beside_a_gpu_takes_time():
    """Of tiny blocks next to nothing; activations on the host are locked in the dense pass, whatever else is there."""
    dense = Piece(DENSE_PASS, -1, "forward", 1)
    node, work = Node(4, 2, 64 << 30, 64 << 30), replace(WORK, texts=((1024, 2048),))
    stores = Stores("device", "host", "device", "all")
    plan = make_plan(MODEL, [node], work, "bfloat16", 2, stores=stores)
    assert plan.device == "cuda"
    found = durations(Work((dense,), {}, 1, 1), MODEL, plan, RATES, 2, node.cpus)
    locked = 1024 * 2048 * 4 * 2 * 3  # two blocks have three boundaries
    assert found.dense_pass - 2 * 2.0 == pytest.approx(locked / LOCKING_BYTES_S)
    on_cpus = took(dense, trials=1)
    assert on_cpus.dense_pass == 2 * 2.0


def test_without_a_rate_nothing_is_said():
    assert took(Piece(NONE, 0, "unknown", 1), trials=1) is None


def test_nothing_to_run_takes_no_time():
    assert took(trials=0).total == 0


def test_libraries_and_ray_start_once_for_all_models():
    instead = RetrainingInstead(2, 1, 0, 0, 0.0, None, None, None)
    looks = [
        Outlook(Work((), {}, 1, 1), took(Piece(NONE, 0, "forward", amount), trials=1), instead)
        for amount in (10, 100)
    ]
    alone, alone_in_process = (
        [total_seconds([look], in_process) or 0.0 for look in looks] for in_process in (False, True)
    )
    ray_start = RAY_START + RAY_START_WORK / 4  # cores
    assert total_seconds(looks) == pytest.approx(sum(alone) - ray_start * IMPORTING)
    in_process = total_seconds(looks, in_process=True)
    assert in_process == pytest.approx(sum(alone_in_process) - IN_PROCESS_START * IMPORTING)
