"""Experts taken apart: the fused module's numbers, shared weights, and what is done about experts without tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import raysweep
from raysweep.errors import UsageError
from raysweep.model.checkpoint import Checkpoint, ModelSource
from raysweep.model.experts import Experts, is_fused, separated, tensor_of
from raysweep.model.layout import uses_of, write_back
from raysweep.model.loading import build_skeleton, layout_of
from raysweep.model.shape_reading import read_shape
from raysweep.model.shard import ModelShard
from tests.families import make_model, token_ids
from tests.zoo import HIDDEN, make_zoo_model, randomize

# Of transformers' kinds: gated; transposed, with biases and a gate of its own; all tokens sorted by expert.
KINDS = ("mixtral", "gpt_oss", "llama4_text")
IDS = token_ids(3, 16)

kinds = pytest.mark.parametrize("family", KINDS)


def fused_in(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_fused(module)]


@kinds
def test_experts_apart_give_what_fused_ones_give(family):
    """The eager loop of the class itself is the reference; expert 3 gets no token."""
    fused = make_zoo_model(family).get_submodule(fused_in(make_zoo_model(family))[0])
    experts = Experts(fused)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(10, HIDDEN, generator=generator)
    if family == "llama4_text":
        arguments: tuple[torch.Tensor, ...] = (torch.cat([hidden, hidden * 0, -hidden, hidden * 0]),)
    else:
        chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(10)])
        arguments = (hidden, chosen, torch.rand(10, 2, generator=generator))
        fused.config._experts_implementation = "eager"
    with torch.no_grad():
        torch.testing.assert_close(experts(*arguments), fused(*arguments), rtol=1e-5, atol=1e-5)


@kinds
def test_every_expert_has_a_gradient_also_without_tokens(family):
    model = make_zoo_model(family)
    experts = Experts(model.get_submodule(fused_in(model)[0])).requires_grad_(True)
    hidden = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
    if family == "llama4_text":
        output = experts(torch.cat([hidden, *[hidden * 0] * 3]))
    else:
        output = experts(hidden, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
    output.square().sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == name.startswith("0."), name


@kinds
def test_a_model_in_memory_stays_as_it_is_and_shares_its_weights(family):
    model = make_zoo_model(family)
    before, names = copy.deepcopy(model.state_dict()), fused_in(model)
    shard = ModelShard.whole(model)
    assert names == fused_in(model)
    for block in shard.blocks:
        for linear in block.linears.values():
            own = tensor_of(model, f"{linear.name}.weight")
            assert own.data_ptr() == linear.weight_OI.data_ptr()
            assert torch.equal(own, linear.weight_OI)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@kinds
def test_what_prune_and_reconstruct_make_can_be_put_into_the_users_model(family):
    model = make_zoo_model(family)
    ids = token_ids(24, 32)
    pruned = raysweep.prune(model, ids, criterion="wanda", sparsity=0.5)
    recovered = raysweep.reconstruct(model, pruned, ids, granularity="subblock", learning_rate=0.003)
    assert (recovered.units.loss_after < recovered.units.loss_before).all()
    recovered.apply(model)
    for name, mask_OI in pruned.masks.items():
        weight_OI = tensor_of(model, f"{name}.weight")
        assert not weight_OI[~mask_OI].any()
        assert weight_OI[mask_OI].all()
    fused = model.get_submodule(fused_in(model)[-1])
    assert float((fused.down_proj == 0).float().mean()) == pytest.approx(0.5)


def test_every_matrix_of_every_expert_is_a_linear_and_routers_are_none(tmp_path):
    make_zoo_model("qwen2_moe").save_pretrained(tmp_path)
    (first, _) = read_shape(ModelSource(str(tmp_path))).blocks
    short = {name.removeprefix("model.layers.0.") for name in first.linears}
    experts = {f"mlp.experts.{index}.{name}" for index in range(4) for name in ("gate_up_proj", "down_proj")}
    shared = {f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    assert short == experts | shared | {f"self_attn.{name}_proj" for name in "qkvo"}
    assert first.routed == {f"model.layers.0.{name}": 0.5 for name in experts}  # two of four


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "deepseek_v3", "phi3", "gpt2"])
def test_what_is_read_can_be_written_back_under_the_checkpoints_names(tmp_path, family):
    make_zoo_model(family).save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path))
    checkpoint = Checkpoint.open(source)
    shard = ModelShard.load(source)
    shapes = {name: shape for name, (shape, _) in checkpoint.headers().items()}
    layout = layout_of(build_skeleton(source, source.load_config(), torch.float32), checkpoint)
    own = dict(shard.model.state_dict())
    stored = load_file(tmp_path / "model.safetensors")
    uses = uses_of(layout, shapes)
    assert uses.keys() == stored.keys()
    for name, tensor in stored.items():
        again = torch.full_like(tensor, float("nan"))
        write_back(uses[name], again, own)
        assert torch.equal(again, tensor), name


def test_experts_with_too_few_tokens_are_pruned_by_magnitude_and_left_alone():
    """Two samples of 16 tokens, of which each goes to two of four experts: none gets 32 unless all do."""
    model = make_zoo_model("mixtral")
    ids = token_ids(2, 15)
    routed = {name for block in ModelShard.whole(model).blocks for name in block.routed}
    by_size = raysweep.prune(model, ids, criterion="magnitude", sparsity=0.5)
    for criterion in ("wanda", "sparsegpt"):
        pruned = raysweep.prune(model, ids, criterion=criterion, sparsity=0.5, pattern="2:4")
        said = pruned.linears.set_index("unit").fallback
        assert set(said.dropna().index) == routed
        assert said.dropna().str.fullmatch(r"inputs taken as alike: \d+ of 32 routed tokens").all()
    wanda = raysweep.prune(model, ids, criterion="wanda", sparsity=0.5)
    recovered = raysweep.reconstruct(model, wanda, ids, granularity="block", learning_rate=0.003)
    for name in wanda.masks:
        same = torch.equal(wanda.masks[name], by_size.masks[name])
        left = torch.equal(wanda.weights[f"{name}.weight"], recovered.weights[f"{name}.weight"])
        assert same == left == (name in routed), name
    assert by_size.linears.fallback.isna().all()


def test_single_matrices_of_experts_can_be_solved_but_not_trained():
    model, ids = make_zoo_model("mixtral"), token_ids(24, 32)
    pruned = raysweep.prune(model, ids, criterion="wanda", sparsity=0.5)
    with pytest.raises(UsageError, match=r"granularity matrix: .*experts.* is of an expert"):
        raysweep.reconstruct(model, pruned, ids, granularity="matrix", learning_rate=0.01)
    solved = raysweep.reconstruct(model, pruned, ids, granularity="matrix", optimizer="exact")
    assert (solved.units.loss_after < solved.units.loss_before).all()
    assert solved.units.linears.str.contains("experts").sum() == 2 * 4 * 2
    dense = raysweep.prune(model, ids, criterion="wanda", sparsity=0.5, ignore=["re:.*experts.*"])
    fields = {"granularity": "matrix", "learning_rate": 0.01, "ignore": ["re:.*experts.*"]}
    assert len(raysweep.reconstruct(model, dense, ids, **fields).units) == 2 * 4


class ListedExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(HIDDEN, 16), nn.Linear(HIDDEN, 16)
        self.down = nn.Linear(16, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x) * self.gate(x).relu())


class ListedExperts(nn.Module):
    """As models with code of their own have them: a list, of which only those run that a token is routed to."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, count)
        self.experts = nn.ModuleList(ListedExpert() for _ in range(count))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, HIDDEN)
        score, chosen = self.gate(flat).softmax(-1).max(-1)
        output = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            tokens = (chosen == index).nonzero()[:, 0]
            if len(tokens):
                output = output.index_add(0, tokens, expert(flat[tokens]) * score[tokens, None])
        return output.view(hidden.shape)


def test_experts_in_a_list_are_pruned_and_reconstructed_too():
    model = make_model("llama")
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = randomize(ListedExperts(12)).requires_grad_(False)
    ids = token_ids(8, 32)
    pruned = raysweep.prune(model, ids, criterion="wanda", sparsity=0.5)
    assert not any(name.endswith("mlp.gate") for name in pruned.masks)
    assert sum(".experts." in name for name in pruned.masks) == 3 * 12 * 3
    assert pruned.linears.fallback.notna().any()  # 256 tokens among twelve experts
    assert pruned.linears[pruned.linears.unit.str.contains("experts")].fallback.isna().any()
    fields = {"learning_rate": 0.001, "batch_size": 1, "epochs": 3}
    # Weights alone: where routers and norms are trained too, tokens change their one expert, and the loss jumps.
    recovered = raysweep.reconstruct(
        model, pruned, ids, granularity="subblock", trainable="weights", **fields
    )
    assert (recovered.units.loss_after < recovered.units.loss_before).all()


def test_a_module_without_fused_experts_is_not_copied():
    model = make_model("llama")
    assert separated(model) is model


def test_experts_of_another_kind_are_refused_before_anything_is_read(tmp_path):
    make_zoo_model("jetmoe").save_pretrained(tmp_path)
    for read in (read_shape, ModelShard.load):
        with pytest.raises(UsageError, match="has 3 dimensions: fused experts of an unknown kind"):
            read(ModelSource(str(tmp_path)))
