"""The order of samples and the number of steps: nothing is dropped, and only seed and epoch matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.errors import NumericalError
from raysweep.reconstruction.losses import squared_sums
from raysweep.reconstruction.optimizer import MaskedAdamW
from raysweep.reconstruction.training import TrainingRecipe, text_error, train
from tests.reconstruction.ranges import reconstruct_trial

CPU = torch.device("cpu")


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
    assert made == TrainingRecipe("mse", **fields, max_grad_norm=0.7, seed=6)
    assert recipe(epochs=1) == TrainingRecipe("mse", 0.01, 1, 3, True, 0.1, None, 0)


def test_a_smaller_last_batch_is_used():
    """A scalar that is fitted to one sample a time remembers the last one: it must be the odd one out."""
    seen: list[int] = []
    scale = torch.nn.Parameter(torch.zeros(1))

    def run(x_BTH: torch.Tensor) -> torch.Tensor:
        seen.append(x_BTH.shape[0])
        return x_BTH * scale

    inputs_STH = torch.ones(7, 2, 3)
    optimizer = MaskedAdamW([scale], [None], learning_rate=0.1)
    steps = train(run, optimizer, inputs_STH, inputs_STH, recipe(batch_size=3, epochs=2, shuffle=False), CPU)
    assert (steps, seen) == (6, [3, 3, 1, 3, 3, 1])
    assert scale.item() > 0.2


def test_without_targets_the_output_goes_to_zero():
    scale = torch.nn.Parameter(torch.ones(1))
    inputs_STH = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    optimizer = MaskedAdamW([scale], [None], learning_rate=0.1)
    train(lambda x: x * scale, optimizer, inputs_STH, None, recipe(epochs=20, batch_size=2), CPU)
    assert abs(scale.item()) < 0.05


def test_weights_that_diverge_are_an_error():
    scale = torch.nn.Parameter(torch.ones(1))
    inputs_STH = torch.full((6, 2, 3), 1e30)
    optimizer = MaskedAdamW([scale], [None], learning_rate=0.125)
    with pytest.raises(
        NumericalError, match=r"weights are not finite after training at learning rate 0\.125"
    ):
        train(lambda x: x * scale, optimizer, inputs_STH, None, recipe(), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_over_a_text_is_summed_by_sample(dtype):
    """In batches of 2048 tokens: three of them here, the last one smaller."""
    generator = torch.Generator().manual_seed(0)
    inputs_STH = torch.randn(40, 128, 6, generator=generator).to(dtype)
    targets_STH = torch.randn(40, 128, 6, generator=generator).to(dtype)
    sizes: list[int] = []

    def run(x_BTH: torch.Tensor) -> torch.Tensor:
        sizes.append(x_BTH.shape[0])
        return x_BTH * 2

    error = text_error(run, inputs_STH, targets_STH, CPU)
    difference = (inputs_STH * 2).double() - targets_STH.double()
    assert sizes == [16, 16, 8]
    assert list(error.errors) == pytest.approx((difference**2).sum((1, 2)).tolist(), rel=1e-6)
    assert list(error.targets) == pytest.approx((targets_STH.double() ** 2).sum((1, 2)).tolist(), rel=1e-6)
    assert error.mean == pytest.approx(float((difference**2).mean()), rel=1e-6)
    power = float((targets_STH.double() ** 2).sum())
    assert error.relative == pytest.approx(float((difference**2).sum()) / power, rel=1e-6)


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
