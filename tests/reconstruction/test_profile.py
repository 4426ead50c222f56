"""FLOPs of a step by formula, the parameters that matter, and that a profile leaves no trace."""

from __future__ import annotations

import gc

import pytest
import torch

from raysweep.reconstruction.profile import _Saved, profile_step
from raysweep.reconstruction.recovery import recover_unit
from tests.families import make_model
from tests.reconstruction.ranges import SAMPLES, TOKENS, prune_all, range_of, reconstruct_trial

HEADS, HEAD_WIDTH = 4, 8


def products(block, name: str) -> int:
    """Six operations a weight and token: forward, gradient of the input, gradient of the weight."""
    linears = {full: linear for full, linear in block.linears.items() if name in full}
    return 6 * sum(linear.weight_OI.numel() for linear in linears.values())


def attention(samples: int) -> int:
    """Two products forward, five backward, over all pairs of tokens of every head."""
    return samples * HEADS * 2 * TOKENS * TOKENS * HEAD_WIDTH * (2 + 5)


def made_by_a_product(arguments):
    """What blocks take besides hidden states, of which the first of a shape takes a product of matrices."""
    seen = set()

    def make(samples: int, tokens: int):
        if (samples, tokens) not in seen:
            seen.add((samples, tokens))
            torch.ones(tokens, tokens) @ torch.ones(tokens, tokens)
        return arguments(samples, tokens)

    return make


@pytest.mark.parametrize("samples", [1, 3])
def test_flops_of_a_step(samples):
    blocks = range_of(make_model("llama"))
    block = blocks.blocks[1]
    x_BTH = torch.randn(samples, TOKENS, 32, generator=torch.Generator().manual_seed(0))
    halves = {"self_attn": block.halves.attention, "mlp": block.halves.mlp}
    for name, module in halves.items():
        profile = profile_step(module, lambda x, module=module: block.run(x, module), x_BTH)
        expected = samples * TOKENS * products(block, name) + (name == "self_attn") * attention(samples)
        assert profile.step_flops == expected
    whole = profile_step(block.module, block.run, x_BTH)
    assert whole.step_flops == samples * TOKENS * products(block, "") + attention(samples)


def test_a_half_depends_on_its_own_parameters():
    block = range_of(make_model("llama")).blocks[1]
    x_BTH = torch.randn(2, TOKENS, 32, generator=torch.Generator().manual_seed(0))
    profile = profile_step(block.halves.mlp, lambda x: block.run(x, block.halves.mlp), x_BTH)
    shorts = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")
    assert set(profile.parameters) == {f"{short}.weight" for short in shorts}


def test_a_profile_leaves_no_trace_even_when_the_step_fails():
    block = range_of(make_model("llama")).blocks[1]

    def fails(x: torch.Tensor) -> torch.Tensor:
        block.run(x)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        profile_step(block.module, fails, torch.zeros(1, TOKENS, 32))
    profile_step(block.module, block.run, torch.ones(1, TOKENS, 32))
    for parameter in block.module.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_saved_bytes_are_of_activations_and_grow_with_the_tokens():
    block = range_of(make_model("llama")).blocks[1]
    one, four = (
        profile_step(block.module, block.run, torch.randn(n, TOKENS, 32)).saved_bytes for n in (1, 4)
    )
    kept_at_least = 4 * TOKENS * (3 * 32 + 3 * 48)  # inputs of the linears and of the gate's product
    assert kept_at_least < one < 2.5 * kept_at_least
    assert 3 * one < four < 4.01 * one


@pytest.mark.parametrize("trainable", ["all", "weights"])
@pytest.mark.parametrize("granularity", ["matrix", "subblock"])
def test_flops_of_a_unit_are_those_of_all_samples_and_epochs(granularity, trainable):
    trial = reconstruct_trial(granularity=granularity, trainable=trainable, epochs=5, batch_size=SAMPLES)
    blocks = range_of(make_model("llama"))
    prune_all(blocks, "trial", trial)
    unit = {"matrix": "1.mlp.up_proj", "subblock": "1.mlp"}[granularity]
    result = recover_unit(blocks, "trial", trial, unit)
    behind_the_norm = 2 * 2 * 48 * 32  # no gradient of what gate and up take
    half = products(blocks.blocks[1], "mlp") - behind_the_norm
    a_token = {"matrix": 4 * 48 * 32, "subblock": half}[granularity]
    assert result.training_flops == 5 * SAMPLES * TOKENS * a_token


def test_what_is_made_once_for_a_shape_is_no_part_of_a_step():
    """Such as rotary angles: whichever unit comes first would have more FLOPs than the others."""
    found = []
    for _ in range(2):
        blocks, trial = range_of(make_model("llama")), reconstruct_trial(granularity="subblock", batch_size=1)
        prune_all(blocks, "trial", trial)
        block = blocks.blocks[0]
        if not found:
            block.arguments = made_by_a_product(block.arguments)
        found.append(recover_unit(blocks, "trial", trial, "0.attention").training_flops)
    assert found[0] == found[1]


def test_what_a_pass_saved_ends_with_it():
    """Norms and attention save what they give: a reference to that would hold the pass, and the pass the reference."""
    block = range_of(make_model("llama")).blocks[1]
    x_BTH = torch.randn(2, TOKENS, 32, generator=torch.Generator().manual_seed(0))
    assert profile_step(block.module, block.run, x_BTH).saved_bytes > 0
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, _Saved)]
