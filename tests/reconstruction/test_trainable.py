"""Low-rank changes under the mask against a naive loop, exact zeros after merging, and what is trained."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call

from raysweep.reconstruction.boundaries import INPUT
from raysweep.reconstruction.measures import CALIBRATION
from raysweep.reconstruction.optimizer import learning_rate_factor
from raysweep.reconstruction.recovery import find_unit, recover_unit
from raysweep.reconstruction.trainable import LowRank
from tests.families import FAMILIES, make_model
from tests.reconstruction.ranges import (
    IDS,
    SAMPLES,
    masks_of,
    prune_all,
    range_of,
    reconstruct_trial,
    recover_all,
)
from tests.reconstruction.streams import hidden_states, written

LORA = {"trainable": "lora", "lora_rank": 4, "lora_alpha": 8.0}


def naive_lora(blocks, trial, unit, norms: bool) -> dict[str, torch.Tensor]:
    """W + (alpha / r) * mask * (B A) written out for every linear of a block, plain AdamW, samples in order."""
    block, masks = unit.block, masks_of(blocks, trial)
    dense = {name: parameter.detach() for name, parameter in block.module.named_parameters()}
    scale = trial.lora_alpha / trial.lora_rank
    start = LowRank(blocks, "trial", trial, unit, [])
    factors = {name: tuple(p.detach().clone() for p in pair) for name, pair in start._factors.items()}
    leaves = {name: [part.requires_grad_(True) for part in pair] for name, pair in factors.items()}
    norm_leaves = {
        name: t.clone().requires_grad_(True) for name, t in dense.items() if norms and "norm" in name
    }

    def weights() -> dict[str, torch.Tensor]:
        made = dict(dense) | norm_leaves
        for name, (b_OR, a_RI) in leaves.items():
            short, linear = name.removeprefix(f"{block.prefix}."), block.linears[name]
            mask = masks[f"{name}.weight"]
            change = (b_OR @ a_RI).T if linear.transposed else b_OR @ a_RI
            made[f"{short}.weight"] = dense[f"{short}.weight"] * mask + scale * mask * change
        return made

    trained = [part for pair in leaves.values() for part in pair] + list(norm_leaves.values())
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0, foreach=False, fused=False)
    x = blocks.texts[CALIBRATION].activations.get(INPUT, block.index)
    target = blocks.texts[CALIBRATION].activations.get(INPUT, block.index + 1)
    arguments = block.arguments
    steps = trial.epochs * math.ceil(SAMPLES / trial.batch_size)
    for step in range(steps):
        first = step % math.ceil(SAMPLES / trial.batch_size) * trial.batch_size
        rows = slice(first, first + trial.batch_size)
        positional, keywords = arguments(len(x[rows]), x.shape[1])
        output = functional_call(block.module, weights(), (x[rows], *positional), dict(keywords))
        output = output[0] if isinstance(output, tuple) else output
        optimizer.zero_grad()
        ((output - target[rows]) ** 2).mean().backward()
        optimizer.param_groups[0]["lr"] = trial.learning_rate * learning_rate_factor(
            step, steps, trial.warmup_fraction
        )
        optimizer.step()
    return {f"{block.prefix}.{name}": tensor.detach() for name, tensor in weights().items()}


@pytest.mark.parametrize("trainable", ["lora", "lora+norms"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_low_rank_changes_equal_the_naive_loop(family, trainable):
    blocks = range_of(make_model(family))
    trial = reconstruct_trial(granularity="block", shuffle=False, **LORA | {"trainable": trainable})
    prune_all(blocks, "trial", trial)
    unit = find_unit(blocks, "block", "1")
    expected = naive_lora(blocks, trial, unit, norms=trainable == "lora+norms" and family == "llama")
    result = recover_unit(blocks, "trial", trial, "1")
    assert result is not None
    prefix = f"{unit.block.prefix}."
    own = {name: tensor for name, tensor in blocks.weights["trial"].items() if name.startswith(prefix)}
    if family == "llama":
        for name, weight in own.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-5, msg=name)
    linears = {f"{name}.weight" for name in unit.linears}
    others = own.keys() - linears
    assert all("norm" in name or ".ln_" in name for name in others)
    assert bool(others) == (trainable == "lora+norms")
    factors = sum(4 * sum(linear.weight_OI.shape) for linear in unit.linears.values())
    assert result.trainable_parameters == factors + sum(own[name].numel() for name in others)
    assert result.loss_after < result.loss_before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", ["matrix", "subblock", "block"])
def test_merged_weights_have_exactly_the_masks_zeros(granularity, dtype):
    blocks = range_of(make_model("llama").to(dtype))
    trial = reconstruct_trial(granularity=granularity, criterion="sparsegpt", **LORA)
    recover_all(blocks, "trial", trial)
    for name, mask in masks_of(blocks, trial).items():
        weight = blocks.weights["trial"][name]
        assert weight.dtype == dtype
        assert not bool(weight[~mask].count_nonzero())
        assert bool(weight[mask].count_nonzero() > 0.9 * mask.sum())


def test_a_merged_model_gives_what_was_trained():
    """The unit's own error, measured with the merged weights, is that of a copy of the model which holds them."""
    blocks = range_of(make_model("llama"))
    trial = reconstruct_trial(granularity="model", **LORA)
    (result,) = recover_all(blocks, "trial", trial)
    dense, recovered = hidden_states(make_model("llama"))[-1], hidden_states(written(blocks))[-1]
    assert result.loss_after == pytest.approx(float(((recovered - dense).double() ** 2).mean()), rel=1e-4)


def test_the_start_depends_on_seed_and_name_alone():
    first, second = (
        reconstruct_trial(**LORA, seed=seed, shuffle=False, granularity="block") for seed in (1, 2)
    )
    made = {}
    for number, (trial, unit_name) in enumerate([(first, "1"), (first, "1"), (second, "1"), (first, "2")]):
        blocks = range_of(make_model("llama"))
        prune_all(blocks, "trial", trial)
        start = LowRank(blocks, "trial", trial, find_unit(blocks, "block", unit_name), [])
        made[number] = {name.partition("layers.")[2][2:]: pair for name, pair in start._factors.items()}
    name = "mlp.up_proj"
    b_OR, a_RI = made[0][name]
    assert not bool(b_OR.count_nonzero())
    assert float(a_RI.detach().abs().max()) <= 1 / math.sqrt(a_RI.shape[1])
    assert torch.equal(a_RI, made[1][name][1])
    assert not torch.equal(a_RI, made[2][name][1])
    assert not torch.equal(a_RI, made[3][name][1])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("loss", ["mse", "normalized_mse", "cosine"])
@pytest.mark.parametrize("granularity", ["matrix", "subblock", "block"])
def test_every_loss_falls_with_every_optimizer(granularity, loss, optimizer):
    rate = {"adamw": 0.005, "sgd": {"mse": 0.5, "normalized_mse": 0.05, "cosine": 0.05}[loss]}[optimizer]
    blocks = range_of(make_model("llama"), validation=True)
    trial = reconstruct_trial(
        granularity=granularity, loss=loss, optimizer=optimizer, learning_rate=rate, epochs=6, sparsity=0.7
    )
    results = recover_all(blocks, "trial", trial)
    assert sum(r.loss_after for r in results) < sum(r.loss_before for r in results)
    assert all(r.validation_loss_after is not None for r in results)
    for result in results:  # the relative squared error is reported whatever the loss
        if loss != "mse":
            assert result.error_before != pytest.approx(result.loss_before, rel=1e-3)


@pytest.mark.parametrize("loss", ["normalized_mse", "cosine"])
def test_losses_of_matrices_are_taken_on_their_outputs(loss):
    """Not on the change of the output, of which mse needs no more."""
    blocks = range_of(make_model("opt"))
    trial = reconstruct_trial(granularity="matrix", loss=loss)
    results = {r.linears: r for r in recover_all(blocks, "trial", trial)}
    plain = {r.linears: r for r in recover_all(blocks, "mse", reconstruct_trial(granularity="matrix"))}
    for name, result in results.items():
        assert result.error_before == pytest.approx(plain[name].error_before, rel=1e-4)
    assert len(IDS) == SAMPLES
    assert FAMILIES["opt"].attention
