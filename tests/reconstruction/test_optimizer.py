"""The schedule against transformers' own, steps against plain AdamW, masks, masters and clipping."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import get_linear_schedule_with_warmup

from raysweep.errors import NumericalError
from raysweep.reconstruction.optimizer import MaskedOptimizer, clip_factor, learning_rate_factor


@settings(max_examples=40, deadline=None)
@given(total=st.integers(1, 60), warmup_fraction=st.floats(0, 1))
def test_the_schedule_is_transformers_linear_one(total, warmup_fraction):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(warmup_fraction * total), total)
    for step in range(total):
        assert learning_rate_factor(step, total, warmup_fraction) == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()


def parameters_and_gradients(
    dtype: torch.dtype, steps: int
) -> tuple[list[nn.Parameter], list[list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 4), (3,), (4, 4)]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    gradients = [
        [torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(steps)
    ]
    return parameters, gradients


def masks_for(parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
    """On both matrices; their removed entries are zero, as masks require."""
    masks: list[torch.Tensor | None] = [None] * len(parameters)
    for k in (0, 2):
        masks[k] = torch.rand(parameters[k].shape, generator=torch.Generator().manual_seed(k)) > 0.5
        parameters[k].data *= masks[k]
    return masks


PLAIN = {
    "adamw": lambda exact: torch.optim.AdamW(exact, lr=1.0, weight_decay=0.0, foreach=False, fused=False),
    "sgd": lambda exact: torch.optim.SGD(exact, lr=1.0, momentum=0.9, foreach=False, fused=False),
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_are_those_in_float64_on_masked_gradients(dtype, max_grad_norm, kind):
    """The gradients of removed entries count neither in a step nor in the norm that is clipped."""
    parameters, gradients = parameters_and_gradients(dtype, steps=12)
    masks = masks_for(parameters)
    exact = [nn.Parameter(parameter.detach().double()) for parameter in parameters]
    plain = PLAIN[kind](exact)
    optimizer = MaskedOptimizer(kind, parameters, masks, learning_rate=0.02)
    for step, of_step in enumerate(gradients):
        factor = (step + 1) / 10
        for parameter, twin, gradient, mask in zip(parameters, exact, of_step, masks, strict=True):
            parameter.grad = gradient.clone()
            twin.grad = gradient.double() * (1 if mask is None else mask)
        norm = torch.cat([twin.grad.flatten() for twin in exact]).norm()
        if max_grad_norm is not None and norm > max_grad_norm:
            for twin in exact:
                twin.grad *= max_grad_norm / norm
        plain.param_groups[0]["lr"] = 0.02 * factor
        plain.step()
        optimizer.gather()
        clip = clip_factor(optimizer.squares(), max_grad_norm)
        assert (clip == 1.0) == (max_grad_norm in (None, 100.0))
        optimizer.step(factor, clip)
        for parameter, master, twin, mask in zip(parameters, optimizer.masters, exact, masks, strict=True):
            torch.testing.assert_close(master.double(), twin, rtol=1e-4, atol=1e-5)
            assert torch.equal(parameter, master.to(dtype))
            assert parameter.grad is None
            assert master.grad is None
            if mask is not None:
                assert not bool(master[~mask].count_nonzero())
                assert not bool(parameter[~mask].count_nonzero())


def test_small_steps_add_up_in_the_masters():
    """A thousand steps of 1e-5 on a weight of one: bfloat16 alone would never move."""
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MaskedOptimizer("adamw", [parameter], [None], learning_rate=1e-5)
    for _ in range(1000):
        parameter.grad = torch.ones_like(parameter)
        optimizer.gather()
        optimizer.step(1.0)
    assert optimizer.masters[0].item() == pytest.approx(0.99, abs=1e-4)
    assert parameter.item() == pytest.approx(0.99, abs=0.004)


def test_masters_in_float32_are_the_parameters_themselves():
    parameters, _ = parameters_and_gradients(torch.float32, steps=0)
    masters = MaskedOptimizer("adamw", parameters, [None] * 3, 0.1).masters
    assert all(a is b for a, b in zip(masters, parameters, strict=True))


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, float("nan")), (torch.bfloat16, float("inf")), (torch.float16, 1e6)]
)
def test_weights_that_are_not_finite_are_an_error(dtype, value):
    """In float16 a million is infinite, although its master is not."""
    parameters, gradients = parameters_and_gradients(dtype, steps=1)
    optimizer = MaskedOptimizer("adamw", parameters, [None] * 3, learning_rate=0.25)
    for parameter, gradient in zip(parameters, gradients[0], strict=True):
        parameter.grad = gradient
    optimizer.gather()
    optimizer.step(1.0)
    optimizer.check()
    optimizer.masters[2].data[1, 1] = value
    for parameter, gradient in zip(parameters, gradients[0], strict=True):
        parameter.grad = gradient
    optimizer.gather()
    optimizer.step(1.0)
    with pytest.raises(NumericalError, match=r"learning rate 0\.25"):
        optimizer.check()


@pytest.mark.parametrize(
    ("dtype", "each"), [(torch.float32, 4 * 3), (torch.bfloat16, 2 + 4 + 4 * 3)], ids=str
)
def test_bytes_are_those_of_gradients_moments_masters_and_masks(dtype, each):
    """Gradient and two moments in float32; bfloat16 adds a master, and a gradient of its own."""
    parameters, _ = parameters_and_gradients(dtype, steps=0)
    numbers = sum(parameter.numel() for parameter in parameters)
    assert MaskedOptimizer("adamw", parameters, [None] * 3, 0.1).nbytes == numbers * each
    masks = masks_for(parameters)
    masked = sum(mask.numel() for mask in masks if mask is not None)
    assert MaskedOptimizer("adamw", parameters, masks, 0.1).nbytes == numbers * each + 4 * masked
    assert MaskedOptimizer("sgd", parameters, masks, 0.1).nbytes == numbers * (each - 4) + 4 * masked


def test_clipping_is_torchs_own_whatever_parts_the_gradients_are_in():
    gradients = [torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    parameters = [nn.Parameter(torch.zeros(7, 5)) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    squares = []
    for parameter in parameters:
        part = MaskedOptimizer("adamw", [parameter], [None], 0.1)
        part.gather()
        squares.append(part.squares())
    factor = clip_factor([square for part in squares for square in part], 0.5)
    assert factor == clip_factor([square for part in reversed(squares) for square in part], 0.5)
    nn.utils.clip_grad_norm_(parameters, 0.5)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(gradient * factor, parameter.grad)
