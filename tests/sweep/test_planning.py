"""What a sweep asks of its shards: the most that any of its calibration sets and phases asks."""

from __future__ import annotations

from raysweep.cluster.nodes import Node
from raysweep.shards.memory import Workload
from raysweep.sweep.planning import make_plans, workload
from raysweep.sweep.prepare import prepare


def workload_of(space) -> Workload:
    (model,) = prepare(space, "cpu")
    return workload(model)


def test_the_largest_calibration_set_counts_wherever_it_stands(make_space):
    for samples, lengths in (([6, 2], 32), ([2, 6], 32), ([2, 6], [16, 32]), (6, [8, 32]), (6, [32, 8])):
        work = workload_of(make_space(calibration={"num_samples": samples, "sequence_length": lengths}))
        assert work.texts[0] == (6, 32)
        assert work.texts[1][0] == 3


def test_masks_are_kept_phase_by_phase_and_the_random_ones_by_seed(make_space):
    trial = {"recovery": "none", "criterion": ["random", "wanda", "magnitude"], "sparsity": [0.5, 0.6]}
    assert workload_of(make_space(sweep=[trial])).masks == 6
    assert workload_of(make_space(sweep=[trial], calibration={"seed": [0, 1]})).masks == 6
    assert workload_of(make_space(sweep=[trial | {"seed": [0, 1, 2]}])).masks == 3 * 2 + 2 + 2


def test_recoveries_share_the_masks_of_pruning(make_space):
    work = workload_of(make_space())
    assert (work.masks, work.matrices, work.halves, bool(work.granularities)) == (2, True, True, True)


def test_trials_with_weights_of_their_own_are_counted_by_calibration_set(make_space):
    pruned = {"recovery": "none", "criterion": ["wanda", "magnitude"], "sparsity": 0.5}
    retrained = {"recovery": "retrain", "criterion": "wanda", "sparsity": 0.5, "learning_rate": 1e-3}
    assert workload_of(make_space(sweep=[pruned])).most_trials == 2  # the dense model has none
    assert workload_of(make_space(sweep=[pruned], calibration={"seed": [0, 1]})).most_trials == 2
    assert workload_of(make_space(sweep=[pruned, retrained])).most_trials == 4  # with what it starts from


def test_one_at_a_time_is_one_in_flight(make_space):
    space = make_space(execution={"concurrent_trials": 4})
    models, nodes = prepare(space, "cpu"), [Node(2, 0, 64 << 30)]
    assert [plan.concurrent_trials for plan in make_plans(models, space, nodes)] == [4]
    (alone,) = make_plans(models, space, nodes, one_at_a_time=True)
    assert alone.concurrent_trials == 1
