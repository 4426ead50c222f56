"""The order of samples and the number of steps: nothing is dropped, and only seed and epoch matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.reconstruction.losses import squared_sums
from raysweep.reconstruction.objectives import ModuleObjective
from raysweep.reconstruction.recovery import find_unit
from raysweep.reconstruction.stage import Stage
from raysweep.reconstruction.training import TrainingRecipe
from tests.families import make_model
from tests.reconstruction.ranges import prune_all, range_of, reconstruct_trial


def recipe(**fields: object) -> TrainingRecipe:
    return TrainingRecipe.of(reconstruct_trial(**fields))


@settings(deadline=None)
@given(
    samples=st.integers(1, 40),
    epochs=st.integers(1, 4),
    batch_size=st.integers(1, 45),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_epoch_takes_every_sample_once(samples, epochs, batch_size, shuffle, seed):
    steps = recipe(epochs=epochs, batch_size=batch_size, shuffle=shuffle, seed=seed)
    batches = [rows.tolist() for rows in steps.sample_batches(samples)]
    assert len(batches) == steps.step_count(samples)
    for epoch in range(epochs):
        of_epoch = batches[epoch * len(batches) // epochs : (epoch + 1) * len(batches) // epochs]
        order = [row for rows in of_epoch for row in rows]
        assert sorted(order) == list(range(samples))
        assert order == list(range(samples)) or shuffle
        assert all(len(rows) == batch_size for rows in of_epoch[:-1])
        assert 1 <= len(of_epoch[-1]) <= batch_size


def test_the_order_depends_on_seed_and_epoch_alone():
    expected = recipe(seed=3).sample_order(30, epoch=1)
    other = recipe(
        seed=3, learning_rate=0.5, granularity="block", criterion="magnitude", batch_size=1, epochs=9
    )
    torch.manual_seed(123)
    assert torch.equal(other.sample_order(30, epoch=1), expected)
    assert not torch.equal(recipe(seed=4).sample_order(30, epoch=1), expected)
    assert not torch.equal(recipe(seed=3).sample_order(30, epoch=2), expected)
    assert not torch.equal(expected, torch.arange(30))


def test_the_whole_recipe_comes_from_the_trial():
    fields = {"learning_rate": 0.3, "epochs": 4, "batch_size": 5, "shuffle": False, "warmup_fraction": 0.0}
    made = recipe(**fields, max_grad_norm=0.7, criterion="random", seed=6)
    assert made == TrainingRecipe("adamw", **fields, max_grad_norm=0.7, seed=6)
    assert recipe(epochs=1) == TrainingRecipe("adamw", 0.01, 1, 3, True, 0.1, None, 0)


def test_a_smaller_last_batch_is_used(monkeypatch):
    blocks, trial = range_of(make_model("llama")), reconstruct_trial(granularity="block")
    prune_all(blocks, "trial", trial)
    unit = find_unit(blocks, "block", "1")
    objective, seen = ModuleObjective(blocks, "trial", trial, unit), []
    run = objective.run
    monkeypatch.setattr(
        objective, "run", lambda x_BTH, instead: seen.append(len(x_BTH)) or run(x_BTH, instead)
    )
    Stage(blocks, "trial", trial, unit, objective).train()
    assert seen == [3, 3, 1, 3, 3, 1]


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 8), tokens=st.integers(1, 70), hidden=st.sampled_from([1, 7, 32, 300]))
def test_sums_of_squares_do_not_depend_on_the_batch(cut, tokens, hidden):
    x_BTH = torch.randn(9, tokens, hidden, generator=torch.Generator().manual_seed(tokens))
    assert squared_sums(x_BTH) == squared_sums(x_BTH[:cut]) + squared_sums(x_BTH[cut:])
    assert squared_sums(x_BTH) == pytest.approx((x_BTH.double() ** 2).sum((1, 2)).tolist(), rel=1e-6)


def test_sums_of_squares_do_not_depend_on_the_threads():
    """Large enough that torch would sum one sample's four million numbers in another order."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(1, 4096, 1024, generator=generator) for _ in range(4)]
    sums = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        sums.append([squared_sums(x_BTH) for x_BTH in texts])
    torch.set_num_threads(1)
    assert sums == [sums[0]] * 4
