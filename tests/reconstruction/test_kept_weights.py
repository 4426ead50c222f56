"""AdamW that has only kept weights against torch's own on float32 masters."""

from __future__ import annotations

import pytest
import torch

from raysweep.reconstruction.device_optimizer import BETAS, EPSILON, DeviceOptimizer
from raysweep.reconstruction.kept_weights import TILE, KeptWeights, can_keep
from raysweep.reconstruction.training import TrainingRecipe

RECIPE = TrainingRecipe("adamw", 1e-2, 1, 1, False, 0.0, None, 0)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_there_is_a_kernel_for_16_bits_on_a_gpu_only():
    assert not can_keep(torch.zeros(4, 4, dtype=torch.bfloat16))
    if torch.cuda.is_available():
        weight = torch.zeros(4, 4, dtype=torch.bfloat16, device="cuda")
        assert can_keep(weight)
        assert not can_keep(weight.float())
        assert not can_keep(weight.T[1:])


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (8, TILE // 4), (37, 129)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_its_steps_are_torchs(dtype, shape, density):
    generator = torch.Generator("cuda").manual_seed(0)
    mask = torch.rand(shape, generator=generator, device="cuda") < density
    weight = torch.randn(shape, generator=generator, device="cuda").to(dtype) * mask
    master = torch.nn.Parameter(weight.float())
    theirs = torch.optim.AdamW([master], lr=RECIPE.learning_rate, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    ours = KeptWeights(weight, mask)
    table = DeviceOptimizer(RECIPE, [torch.nn.Parameter(weight.clone())], [None], False).table([1.0] * 5)
    for row_3 in table:
        gradient = torch.randn(shape, generator=generator, device="cuda").to(dtype)
        master.grad = gradient.float() * mask
        theirs.step()
        ours.step(gradient, row_3[1], row_3[2], BETAS, EPSILON)
    torch.testing.assert_close(ours._master, master.detach()[mask], rtol=1e-5, atol=1e-6)
    assert torch.equal(weight[~mask], torch.zeros_like(weight[~mask]))
    torch.testing.assert_close(weight.float(), master.detach().to(dtype).float(), rtol=0.01, atol=1e-6)
