"""Ratios of errors: exact sums in any order, and what happens at zero."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysweep.reconstruction.losses import LOSSES, batch_error, mean_squared_error
from raysweep.reconstruction.measures import TextError, ratio

sums = st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=20)


@given(errors=sums, targets=sums, data=st.data())
def test_a_ratio_is_exact_and_does_not_depend_on_the_order(errors, targets, data):
    shuffled = ratio(data.draw(st.permutations(errors)), data.draw(st.permutations(targets)))
    assert shuffled == ratio(errors, targets)
    exact = Fraction(0) + sum(map(Fraction, errors)), Fraction(0) + sum(map(Fraction, targets))
    assert ratio(errors, targets) == pytest.approx(float(exact[0] / exact[1]), rel=1e-15)
    assert TextError(tuple(errors), tuple(targets)).relative == ratio(errors, targets)
    assert TextError(losses=tuple(errors), elements=3).loss == pytest.approx(float(exact[0] / 3), rel=1e-15)


def test_a_target_of_nothing():
    assert ratio([0.0], [0.0]) == 0.0
    assert ratio([1.0], [0.0]) == math.inf
    assert math.isnan(ratio([math.nan], [1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mean_squared_error_is_taken_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(3, 5, 7, generator=generator).to(dtype) for _ in range(2))
    loss = mean_squared_error(output, target)
    assert loss.dtype == torch.float32
    expected = sum(
        (a - b) ** 2 for a, b in zip(output.flatten().tolist(), target.flatten().tolist(), strict=True)
    )
    assert loss.item() == pytest.approx(expected / 105, rel=1e-6)
    assert LOSSES["mse"].mean(output, target) == loss


def naive(loss: str, output: torch.Tensor, target: torch.Tensor) -> float:
    """The contract's formulas, token by token, in float64."""
    tokens = []
    for y_new, y in zip(output.double().flatten(0, 1), target.double().flatten(0, 1), strict=True):
        if loss == "mse":
            tokens.append(float(((y_new - y) ** 2).sum()) / len(y))
        elif loss == "normalized_mse":
            tokens.append(float(((y_new - y) ** 2).sum() / ((y**2).sum() + 1e-6)))
        else:
            tokens.append(1.0 - float((y_new @ y) / (y_new.norm() * y.norm())))
    return sum(tokens) / len(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_their_formulas_in_float64(loss, dtype):
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(4, 5, 7, generator=generator).to(dtype) for _ in range(2))
    target[1, 2] = 0.0 if loss == "normalized_mse" else target[1, 2]
    expected = naive(loss, output, target)
    assert LOSSES[loss].mean(output, target).item() == pytest.approx(expected, rel=1e-5)
    whole = batch_error(LOSSES[loss], output, target)
    assert whole.loss == pytest.approx(expected, rel=1e-5)
    parts = [batch_error(LOSSES[loss], output[rows], target[rows]) for rows in (slice(0, 1), slice(1, 4))]
    assert sum(parts, TextError()) == whole
    assert list(whole.errors) == pytest.approx(
        ((output.double() - target.double()) ** 2).sum((1, 2)).tolist(), rel=1e-6
    )
    assert list(whole.targets) == pytest.approx((target.double() ** 2).sum((1, 2)).tolist(), rel=1e-6)
