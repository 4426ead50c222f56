"""Norms whose gradients follow from those of the weights behind them: where they are found, and that they are right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raysweep.reconstruction.entry_norm import Watch, norm_gradient
from raysweep.reconstruction.objectives import objective_of
from raysweep.reconstruction.recovery import find_unit, recover_unit
from raysweep.reconstruction.stage import Stage
from tests.families import make_model
from tests.reconstruction.ranges import prune_all, range_of, reconstruct_trial

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")


@pytest.mark.parametrize(
    ("unit", "granularity", "norm", "weights"),
    [
        ("1.attention", "subblock", "input_layernorm", ATTENTION),
        ("1.mlp", "subblock", "post_attention_layernorm", MLP),
        ("1", "block", "input_layernorm", ATTENTION),
        ("0-1", "window:2", "input_layernorm", ATTENTION),
    ],
)
def test_the_norm_that_a_unit_begins_with_is_found(unit, granularity, norm, weights):
    blocks = range_of(make_model("llama"))
    trial = reconstruct_trial(granularity=granularity)
    prune_all(blocks, "trial", trial)
    found = find_unit(blocks, granularity, unit)
    prefix = found.block.prefix
    (entry,) = objective_of(blocks, "trial", trial, found).entry_norms()
    assert entry.norm == f"{prefix}.{norm}.weight"
    assert set(entry.weights) == {f"{prefix}.{name}.weight" for name in weights}


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_norm_with_a_bias_is_left_to_autograd(family):
    blocks = range_of(make_model(family))
    trial = reconstruct_trial(granularity="block")
    prune_all(blocks, "trial", trial)
    assert objective_of(blocks, "trial", trial, find_unit(blocks, "block", "1")).entry_norms() == []


class Leaky(nn.Module):
    """A norm and a linear, and something else that takes what the norm gives."""

    def __init__(self, leak: float) -> None:
        super().__init__()
        self.norm, self.linear, self.leak = nn.RMSNorm(8), nn.Linear(8, 6), leak
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.linear(y).relu() + self.leak * y[..., :6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("leak", "found"), [(0.0, 1), (0.1, 0), (0.5, 0)])
def test_what_else_takes_a_norms_output_is_noticed(leak, found, dtype):
    torch.manual_seed(0)
    module, x = Leaky(leak).to(dtype), torch.randn(5, 4, 8).to(dtype)
    watch = Watch(module)
    with watch.watching(x):
        module(x).square().sum().backward()
    assert len(watch.found()) == found
    assert not module.norm._forward_hooks


class PlusOne(nn.RMSNorm):
    """As Gemma's: scales by 1 + w."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 + 1.0 / self.weight)


class Heads(nn.Module):
    """A norm whose output a linear takes head by head; or two linears of one weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.norm, self.tied = nn.RMSNorm(8), tied
        self.one, self.two = (nn.Linear(8 if tied else 4, 8 if tied else 4, bias=False) for _ in range(2))
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        if tied:
            self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.one(y) + self.two(y).relu() if self.tied else self.one(y.view(*y.shape[:-1], 2, 4))


def plus_one() -> nn.Module:
    module = Leaky(0.0)
    module.norm = PlusOne(8)
    nn.init.uniform_(module.norm.weight, 20.0, 30.0)
    return module.bfloat16()


@pytest.mark.parametrize("make", [plus_one, lambda: Heads(True), lambda: Heads(False)])
def test_other_norms_and_other_uses_are_left_to_autograd(make):
    torch.manual_seed(0)
    module = make()
    x = torch.randn(5, 4, 8).to(next(module.parameters()))
    watch = Watch(module)
    with watch.watching(x):
        module(x).square().sum().backward()
    assert watch.found() == ()


@pytest.mark.parametrize("zero", [False, True])
def test_the_gradient_is_autograds(zero):
    torch.manual_seed(0)
    x, gain = torch.randn(50, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64).requires_grad_()
    if zero:
        gain.data[3] = 0.0
    weights = [torch.randn(rows, 8, dtype=torch.float64, requires_grad=True) for rows in (6, 3)]
    y = x * gain
    sum((y @ weight.T).square().sum() for weight in weights).backward()
    with torch.no_grad():
        found = norm_gradient(gain, weights, [weight.grad for weight in weights])
    expected = gain.grad.clone()
    if zero:
        expected[3] = 0.0
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["subblock", "block"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_is_that_by_autograd(granularity, optimizer, monkeypatch):
    """Over all steps; AdamW's first ones make differences of rounding as large as gradients that are nearly zero."""
    trial = reconstruct_trial(granularity=granularity, optimizer=optimizer, epochs=4, learning_rate=1e-3)
    unit = {"subblock": "1.mlp", "block": "1"}[granularity]

    def trained() -> tuple[dict[str, Tensor], int]:
        blocks = range_of(make_model("llama"))
        prune_all(blocks, "trial", trial)
        result = recover_unit(blocks, "trial", trial, unit)
        return blocks.weights["trial"], result.training_flops

    ours, fewer = trained()
    monkeypatch.setattr(Stage, "_tensors", lambda self: self.trainable.instead())
    monkeypatch.setattr(Stage, "_derive_gradients", lambda self: None)
    monkeypatch.setattr(Stage, "_spared_weights", lambda self: 0)
    theirs, more = trained()
    assert fewer < more
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=2e-5, msg=name)


def test_a_norm_is_left_to_autograd_where_a_weight_behind_it_is_not_trained_itself():
    blocks = range_of(make_model("llama"))
    for fields, count in (
        ({}, 1),
        ({"trainable": "lora+norms", "lora_rank": 2}, 0),
        ({"trainable": "weights"}, 0),
    ):
        trial = reconstruct_trial(granularity="block", **fields)
        blocks.release("trial")
        prune_all(blocks, "trial", trial)
        unit = find_unit(blocks, "block", "1")
        stage = Stage(blocks, "trial", trial, unit, objective_of(blocks, "trial", trial, unit))
        assert len(stage._norms) == count
