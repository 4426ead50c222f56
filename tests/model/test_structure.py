"""Blocks, linears, input groups and halves of several families, against what the families are known to be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from raysweep.errors import UsageError
from raysweep.model.checkpoint import ModelSource
from raysweep.model.linears import block_linears, find_blocks
from raysweep.model.shape_reading import read_shape
from raysweep.model.shard import ModelShard
from raysweep.model.structure import Block
from tests.families import BLOCKS, FAMILIES, HIDDEN, in_family, make_model
from tests.zoo import make_zoo_model

families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def shards() -> dict[str, ModelShard]:
    return {family: ModelShard.whole(make_model(family)) for family in FAMILIES}


def some_hidden(samples: int = 2, tokens: int = 12) -> torch.Tensor:
    return torch.randn(samples, tokens, HIDDEN, generator=torch.Generator().manual_seed(5))


@families
def test_blocks_are_found(shards, family):
    shard = shards[family]
    name, modules = find_blocks(shard.model)
    assert name == FAMILIES[family].blocks
    assert [block.module for block in shard.blocks] == list(modules)
    assert [block.prefix for block in shard.blocks] == [f"{name}.{index}" for index in range(BLOCKS)]


@families
def test_linears_that_read_the_same_tensor_are_one_group(shards, family):
    for block in shards[family].blocks:
        expected = FAMILIES[family].groups
        assert len(block.input_groups) == len(expected)
        for names, short_names in zip(block.input_groups, expected, strict=True):
            assert len(names) == len(short_names)
            assert all(in_family(short_names, name) for name in names)
        assert block.leaders == [names[0] for names in block.input_groups]
        assert all(block.leader_of(name) == names[0] for names in block.input_groups for name in names)


@families
def test_a_linear_is_its_weight_and_bias(shards, family):
    """Whatever the layout: the module's output is x W^T + b, in float64."""
    for linear in shards[family].blocks[1].linears.values():
        outputs, inputs = linear.weight_OI.shape
        x = torch.randn(7, inputs, generator=torch.Generator().manual_seed(3))
        expected = x.double() @ linear.weight_OI.double().T
        if linear.bias_O is not None:
            expected = expected + linear.bias_O.double()
        torch.testing.assert_close(linear.module(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert linear.bias_O is None or linear.bias_O.shape == (outputs,)
        stored = linear.as_stored(linear.weight_OI)
        assert torch.equal(stored, linear.module.weight)
        assert stored.is_contiguous()


def block_with_branch_at_zero(block, silent: tuple[str, ...]) -> torch.nn.Module:
    """A copy of the block in which the linears called `silent` give zeros."""
    module = copy.deepcopy(block.module)
    for name, child in module.named_modules():
        if in_family(silent, f"{block.prefix}.{name}"):
            with torch.no_grad():
                for parameter in child.parameters():
                    parameter.zero_()
    return module


@families
def test_a_half_is_the_block_with_the_other_branch_at_zero(shards, family):
    known = FAMILIES[family]
    names = tuple(name for group in known.groups for name in group)
    mlp_linears = tuple(name for name in names if name not in known.attention)
    x_BTH = some_hidden()
    for block in shards[family].blocks:
        halves = block.halves
        assert halves.parallel == known.parallel
        for half, silent in ((halves.attention, mlp_linears), (halves.mlp, known.attention)):
            expected_BTH = block.run(x_BTH, block_with_branch_at_zero(block, silent))
            torch.testing.assert_close(block.run(x_BTH, half), expected_BTH, rtol=1e-6, atol=1e-6)
            assert not torch.allclose(expected_BTH, x_BTH, atol=0.01)  # the branch does something


@families
def test_halves_recombine_to_the_block(shards, family):
    x_BTH = some_hidden()
    for block in shards[family].blocks:
        halves = block.halves
        middle_BTH = block.run(x_BTH, halves.attention)
        if halves.parallel:
            both_BTH = middle_BTH + block.run(x_BTH, halves.mlp) - x_BTH
            torch.testing.assert_close(both_BTH, block.run(x_BTH), rtol=1e-5, atol=1e-5)
        else:  # bitwise, because the dense pass runs either way, as the trials of a sweep need it
            assert torch.equal(block.run(middle_BTH, halves.mlp), block.run(x_BTH))


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_halves_are_found_in_bfloat16(family):
    shard = ModelShard.whole(make_model(family).to(torch.bfloat16))
    assert shard.blocks[0].halves.parallel == FAMILIES[family].parallel


def test_halves_share_the_parameters_of_the_block(shards):
    block = shards["llama"].blocks[0]
    own = {id(parameter) for parameter in block.module.parameters()}
    for half in (block.halves.attention, block.halves.mlp):
        assert {id(parameter) for parameter in half.parameters()} <= own


@pytest.mark.parametrize("after_norm", [False, True])
def test_a_branch_may_add_the_residual_itself(after_norm):
    """As BLOOM's do, which take it beside their input."""
    model = make_zoo_model("bloom", apply_residual_connection_post_layernorm=after_norm)
    if after_norm:  # then the residual is no sum of the block's input and its branches
        with pytest.raises(UsageError, match="granularity matrix or block"):
            _ = ModelShard.whole(model).blocks[0].halves
        return
    for block in ModelShard.whole(model).blocks:
        x_BTH = some_hidden()
        assert torch.equal(
            block.run(block.run(x_BTH, block.halves.attention), block.halves.mlp), block.run(x_BTH)
        )
        for half, silent in (
            (block.halves.attention, ("dense_h_to_4h", "dense_4h_to_h")),
            (block.halves.mlp, ("query_key_value", "dense")),
        ):
            expected_BTH = block.run(x_BTH, block_with_branch_at_zero(block, silent))
            torch.testing.assert_close(block.run(x_BTH, half), expected_BTH, rtol=1e-6, atol=1e-6)
            assert not torch.allclose(expected_BTH, x_BTH, atol=0.01)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states.cumsum(1))


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Mean(), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.attention(hidden_states) * self.mlp(hidden_states)


def test_a_block_that_is_no_sum_of_two_branches_is_refused_at_subblock_only():
    block = Block(Product(), "blocks.0", 0, HIDDEN, lambda _samples, _tokens: ((), {}))
    assert block.input_groups == [["blocks.0.attention.linear"], ["blocks.0.mlp"]]
    with pytest.raises(UsageError, match="granularity matrix or block"):
        _ = block.halves


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)


class Layer(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(4, experts)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))


def test_blocks_are_not_the_experts_within_one_of_them():
    model = nn.Module()
    model.layers = nn.ModuleList(Layer(experts=9) for _ in range(3))
    model.adapters = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    assert find_blocks(model) == ("layers", model.layers)


def test_a_block_with_most_weights_in_no_linear_is_refused():
    """As fused experts in matrices of their own would be, which else would be left dense in silence."""
    block = nn.Module()
    block.linear, block.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, groups=8)
    assert list(block_linears(block, "blocks.0")) == ["blocks.0.linear"]
    block.experts = nn.Parameter(torch.zeros(40, 8))
    with pytest.raises(UsageError, match=r"most weights of blocks\.0 lie in no linear layer, .*experts"):
        block_linears(block, "blocks.0")


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UsageError, match="Sequential has no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_a_linear_that_does_not_run_is_refused():
    shard = ModelShard.whole(make_model("llama"))
    shard.blocks[0].module.spare = nn.Linear(HIDDEN, HIDDEN)
    whole = ModelShard.whole(shard.model)
    with pytest.raises(UsageError, match=r"model\.layers\.0\.spare is not used by its block"):
        _ = whole.blocks[0].input_groups


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("dory", "comes to block 0 after 2 others"),  # passes through its blocks several times
        ("gemma4_text", "what block 0 takes depends on the text"),
        ("deepseek_v4", "block 0 takes 4 x 32 numbers a token, where its hidden size is 32"),
        ("roformer", "what block 0 takes depends on weights outside of it"),
        ("qwen4_exp", "block 0 takes 128 numbers a token, where its hidden size is 32"),
    ],
)
def test_a_model_whose_blocks_are_no_chain_is_refused(family, reason):
    with pytest.raises(UsageError, match=reason):
        ModelShard.whole(make_zoo_model(family))


def test_it_is_refused_before_anything_starts(tmp_path):
    make_zoo_model("roformer").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="depends on weights outside of it"):
        read_shape(ModelSource(str(tmp_path)))


def test_blocks_may_return_lists():
    """As the first GPT's do."""
    model = make_zoo_model("openai-gpt")
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    shard = ModelShard.whole(model)
    with torch.no_grad():
        hidden = shard.embed(ids)
        for block in shard.blocks:
            hidden = block.run(hidden)
        assert torch.equal(shard.logits(hidden), model(ids).logits)
    with pytest.raises(UsageError, match="no sum of attention and MLP"):
        _ = shard.blocks[0].halves


def test_what_is_done_between_blocks_would_be_lost_and_is_refused():
    model = make_model("llama")
    forward = type(model.model).forward

    class Scaling(type(model.model)):
        """Scales what its second block takes."""

        def forward(self, *arguments, **keywords):
            second = self.layers[1]
            handle = second.register_forward_pre_hook(lambda _, given: (given[0] * 2, *given[1:]))
            try:
                return forward(self, *arguments, **keywords)
            finally:
                handle.remove()

    model.model.__class__ = Scaling
    with pytest.raises(UsageError, match="changes what block 0 gives to block 1"):
        ModelShard.whole(model)
