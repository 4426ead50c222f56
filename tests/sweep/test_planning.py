"""What a sweep asks of its shards: the most that any of its calibration sets and phases asks."""

from __future__ import annotations

from raysweep.shards.memory import Workload
from raysweep.sweep.planning import workload
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
