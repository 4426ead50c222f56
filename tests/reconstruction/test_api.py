"""`prune` and `reconstruct`: the model is untouched, removed weights are zero, wrong values are refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import raysweep
from raysweep.errors import NumericalError, UsageError
from raysweep.pruning.recipe import MaskRecipe
from tests.families import FAMILIES, make_model, token_ids
from tests.reconstruction.ranges import mask_of, range_of, reconstruct_trial, recover_all

IDS = token_ids(7, 16)
RECONSTRUCT = {"granularity": "subblock", "learning_rate": 0.01}


def state_of(model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """All that a user could see of a model, tensors copied."""
    parameters = {
        name: (p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone(), p.data_ptr())
        for name, p in model.named_parameters()
    }
    modules = {name: (module.training, type(module)) for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    return {
        **parameters,
        **{f"module {n}": v for n, v in modules.items()},
        **{f"hooks {n}": v for n, v in hooks.items()},
    }


def assert_same_state(left: dict[str, tuple[Any, ...]], right: dict[str, tuple[Any, ...]]) -> None:
    assert left.keys() == right.keys()
    for name, values in left.items():
        for a, b in zip(values, right[name], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


@pytest.fixture
def used_model():
    """A model in the middle of someone's training: gradients, a frozen part, a part in evaluation mode."""
    model = make_model("opt")
    model.train()
    model(IDS, labels=IDS).loss.backward()
    model.model.decoder.layers[0].requires_grad_(False)
    model.model.decoder.layers[1].eval()
    return model


@pytest.mark.parametrize("granularity", ["matrix", "subblock", "block"])
def test_the_model_is_untouched(used_model, granularity):
    before = state_of(used_model)
    pruned = raysweep.prune(used_model, IDS, criterion="wanda", sparsity=0.5)
    assert_same_state(state_of(used_model), before)
    masked = {name: weight.clone() for name, weight in pruned.weights.items()}
    raysweep.reconstruct(used_model, pruned, IDS, granularity=granularity, learning_rate=0.01)
    assert_same_state(state_of(used_model), before)
    assert all(torch.equal(pruned.weights[name], weight) for name, weight in masked.items())


@pytest.mark.parametrize("granularity", ["matrix", "block"])
def test_the_model_is_untouched_after_an_error(used_model, granularity):
    before = state_of(used_model)
    pruned = raysweep.prune(used_model, IDS, criterion="wanda", sparsity=0.5)
    with pytest.raises(NumericalError):
        raysweep.reconstruct(used_model, pruned, IDS, granularity=granularity, learning_rate=1e20)
    assert_same_state(state_of(used_model), before)


def test_numbers_do_not_depend_on_the_models_mode(used_model):
    """Dropout is off, whatever the caller had."""
    calm = copy.deepcopy(used_model).eval().requires_grad_(False)
    results = []
    for model in (used_model, calm):
        pruned = raysweep.prune(model, IDS, criterion="wanda", sparsity=0.5)
        results.append(raysweep.reconstruct(model, pruned, IDS, **RECONSTRUCT))
    assert results[0].units.equals(results[1].units)
    for name, weight in results[0].weights.items():
        assert torch.equal(weight, results[1].weights[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_both_are_what_a_range_of_blocks_computes(family):
    trial = reconstruct_trial(epochs=3, batch_size=2)
    blocks = range_of(make_model(family))
    units = recover_all(blocks, "trial", trial)
    model = make_model(family)
    pruned = raysweep.prune(model, IDS, criterion="wanda", sparsity=0.5)
    recovered = raysweep.reconstruct(model, pruned, IDS, **RECONSTRUCT, epochs=3, batch_size=2)
    assert recovered.units.to_dict("records") == [unit.as_dict() for unit in units]
    assert recovered.weights.keys() == blocks.weights["trial"].keys()
    for name, weight in recovered.weights.items():
        assert torch.equal(weight, blocks.weights["trial"][name])
    for block in blocks.blocks.values():
        for name in block.linears:
            assert torch.equal(pruned.masks[name], mask_of(blocks, MaskRecipe.of(trial), name))
    assert recovered.trial == trial
    assert len(pruned.linears) == len(pruned.masks)
    assert list(pruned.linears["unit"]) == list(pruned.masks)


@pytest.mark.parametrize("pattern", [{"sparsity": 0.7}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_applied_weights_have_exact_zeros(family, dtype, pattern):
    model = make_model(family).to(dtype)
    dense = copy.deepcopy(model)
    pruned = raysweep.prune(model, IDS, criterion="wanda", **pattern)
    recovered = raysweep.reconstruct(model, pruned, IDS, **RECONSTRUCT)
    for result in (pruned, recovered):
        result.apply(model)
        for name, mask_OI in pruned.masks.items():
            mask = mask_OI.T if family == "gpt2" else mask_OI
            weight = model.get_parameter(f"{name}.weight")
            assert not bool(weight[~mask].count_nonzero())
            assert bool(weight[mask].count_nonzero() > 0.9 * mask.sum())
        assert model.dtype == dtype
    for name, parameter in dense.named_parameters():
        if not name.startswith(FAMILIES[family].blocks):
            assert torch.equal(parameter, model.get_parameter(name))


def test_recovery_brings_the_models_output_closer_to_the_dense_one():
    model = make_model("llama")
    with torch.no_grad():
        dense = model(IDS).logits
    pruned = raysweep.prune(model, IDS, criterion="wanda", sparsity=0.6)
    distances = []
    results = [raysweep.reconstruct(model, pruned, IDS, **RECONSTRUCT, epochs=10)]
    for result in (pruned, *results):
        copied = copy.deepcopy(model)
        result.apply(copied)
        with torch.no_grad():
            distances.append(float((copied(IDS).logits - dense).norm()))
    assert distances[1] < 0.8 * distances[0]


@pytest.mark.parametrize("kind", ["numpy", "int32", "uint16"])
def test_any_integers_are_token_ids(kind):
    ids = {
        "numpy": IDS.numpy(),
        "int32": IDS.to(torch.int32),
        "uint16": IDS.numpy().astype(np.uint16),
    }[kind]
    expected = raysweep.prune(make_model("llama"), IDS, criterion="wanda", sparsity=0.5)
    given = raysweep.prune(make_model("llama"), ids, criterion="wanda", sparsity=0.5)
    assert given.linears.equals(expected.linears)


@pytest.mark.parametrize(
    ("calibration", "what"),
    [
        (IDS[0], r"shape \(16,\)"),
        (IDS.float(), r"torch\.float32"),
        (IDS > 3, r"torch\.bool"),
        (IDS[:0], r"shape \(0, 16\)"),
        (IDS[:, :0], r"shape \(7, 0\)"),
        (torch.full((2, 3), 64), r"token 64\n  allowed: 0 to 63"),
        (torch.tensor([[1, 2, -1]]), r"token -1\n  allowed: 0 to 63"),
    ],
)
def test_wrong_calibration_is_refused(calibration, what):
    model = make_model("llama")
    with pytest.raises(UsageError, match=what):
        raysweep.prune(model, calibration, criterion="wanda", sparsity=0.5)
    pruned = raysweep.prune(model, IDS, criterion="wanda", sparsity=0.5)
    with pytest.raises(UsageError, match=what):
        raysweep.reconstruct(model, pruned, calibration, **RECONSTRUCT)


@pytest.mark.parametrize(
    ("fields", "field", "nearest"),
    [
        ({"criterion": "wandaa", "sparsity": 0.5}, "criterion", "wanda"),
        ({"criterion": "wanda", "sparsity": 1.0}, "sparsity", None),
        ({"criterion": "wanda", "sparsity": -0.1}, "sparsity", None),
        ({"criterion": "wanda", "sparsity": "0.5"}, "sparsity", None),
        ({"criterion": "wanda"}, "sparsity", None),
        ({"criterion": "wanda", "pattern": "4:4"}, "pattern", None),
        ({"criterion": "wanda", "sparsity": 0.3, "pattern": "2:4"}, "sparsity", None),
        ({"criterion": "wanda", "pattern": "2:5"}, "needs a number of inputs that 5 divides", None),
        ({"criterion": "wanda", "sparsity": 0.5, "comparison_group": "rows"}, "comparison_group", "row"),
        ({"criterion": "random", "sparsity": 0.5, "seed": -1}, "seed", None),
    ],
)
def test_wrong_values_for_pruning_are_refused(fields, field, nearest):
    with pytest.raises(UsageError, match=field) as caught:
        raysweep.prune(make_model("llama"), IDS, **fields)
    assert caught.value.allowed
    assert caught.value.nearest == nearest


@pytest.mark.parametrize(
    ("fields", "field", "nearest"),
    [
        ({"granularity": "subblok"}, "granularity", "subblock"),
        ({"learning_rate": 0.0}, "learning_rate", None),
        ({"epochs": 0}, "epochs", None),
        ({"epochs": 1.5}, "epochs", None),
        ({"batch_size": "2"}, "batch_size", None),
        ({"trainable": "norms"}, "trainable", "lora+norms"),
        ({"epoch": 3}, "unknown key 'epoch'", "epochs"),
    ],
)
def test_wrong_values_for_reconstruction_are_refused(fields, field, nearest):
    model = make_model("llama")
    pruned = raysweep.prune(model, IDS, criterion="magnitude", sparsity=0.5)
    with pytest.raises(UsageError, match=field) as caught:
        raysweep.reconstruct(model, pruned, IDS, **RECONSTRUCT | fields)
    assert caught.value.allowed
    assert caught.value.nearest == nearest


@pytest.mark.parametrize("other", [("opt", {}), ("llama", {"intermediate_size": 64})], ids=str)
def test_masks_of_another_model_are_refused(other):
    family, changes = other
    pruned = raysweep.prune(make_model(family, **changes), IDS, criterion="magnitude", sparsity=0.5)
    with pytest.raises(UsageError, match="masks are those of another model"):
        raysweep.reconstruct(make_model("llama"), pruned, IDS, **RECONSTRUCT)


def test_the_seed_orders_samples_and_draws_random_masks():
    model = make_model("llama")
    masks = [
        raysweep.prune(model, IDS, criterion="random", sparsity=0.5, seed=seed).masks for seed in (0, 0, 1)
    ]
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(masks[0][name], masks[1][name])
    assert not torch.equal(masks[0][name], masks[2][name])
    pruned = raysweep.prune(model, IDS, criterion="wanda", sparsity=0.5)
    weights = [
        raysweep.reconstruct(model, pruned, IDS, **RECONSTRUCT, seed=seed).weights[f"{name}.weight"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("trainable", ["lora", "lora+norms"])
def test_a_model_recovered_by_lora_gives_the_same_after_it_was_saved_and_loaded(tmp_path, trainable):
    from transformers import AutoModelForCausalLM

    model = make_model("llama")
    pruned = raysweep.prune(model, IDS, criterion="sparsegpt", sparsity=0.6)
    recovered = raysweep.reconstruct(
        model, pruned, IDS, granularity="block", learning_rate=0.01, trainable=trainable, lora_rank=4
    )
    recovered.apply(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    for name, mask_OI in pruned.masks.items():
        assert torch.equal(loaded.get_parameter(f"{name}.weight") == 0, ~mask_OI)


def test_streams_and_statistics_behind_pruned_blocks_are_choices_of_both_calls():
    model = make_model("llama")
    masks = {
        stream: raysweep.prune(model, IDS, criterion="wanda", sparsity=0.5, statistics_stream=stream)
        for stream in ("dense", "pruned")
    }
    assert any(
        not torch.equal(masks["dense"].masks[name], mask) for name, mask in masks["pruned"].masks.items()
    )
    for target in ("dense", "pruned"):
        recovered = raysweep.reconstruct(
            model, masks["pruned"], IDS, **RECONSTRUCT, input_stream="pruned", target_stream=target
        )
        assert (recovered.units.loss_after < recovered.units.loss_before).mean() > 0.5
    with pytest.raises(UsageError, match="statistics_stream"):
        raysweep.reconstruct(model, masks["pruned"], IDS, **RECONSTRUCT, statistics_stream="recovered")


def test_a_16_bit_model_on_a_cpu_is_said_to_be_slow():
    with pytest.warns(UserWarning, match="the model is bfloat16 on a CPU") as caught:
        pruned = raysweep.prune(
            make_model("llama").bfloat16(), token_ids(2, 8), criterion="magnitude", sparsity=0.5
        )
    assert caught[0].filename == __file__
    assert repr(pruned) == (
        "Pruned(trial=Trial(recovery='none', criterion='magnitude', sparsity=0.5, pattern='unstructured', "
        "comparison_group='row'))"
    )


def test_targets_that_name_no_linear_are_refused():
    with pytest.raises(UsageError, match="'up_prj' matches no linear") as caught:
        raysweep.prune(make_model("llama"), IDS, criterion="wanda", sparsity=0.5, targets=["up_prj"])
    assert (caught.value.where, caught.value.nearest) == ("targets", "up_proj")


def test_a_model_that_is_pruned_already_is_no_target():
    model = make_model("llama")
    pruned = raysweep.prune(model, IDS, criterion="magnitude", sparsity=0.5)
    pruned.apply(model)
    with pytest.raises(UsageError, match="pruned already"):
        raysweep.reconstruct(model, pruned, IDS, **RECONSTRUCT)
    assert len(repr(pruned)) < 2000


@pytest.mark.parametrize(
    ("fields", "where"),
    [({"trainable": "lora", "lora_rank": 1000}, "lora_rank"), ({"granularity": "window:9"}, "granularity")],
)
def test_what_the_model_has_no_room_for_is_refused(fields, where):
    model = make_model("llama")
    pruned = raysweep.prune(model, IDS, criterion="magnitude", sparsity=0.5)
    with pytest.raises(UsageError) as caught:
        raysweep.reconstruct(model, pruned, IDS, **(RECONSTRUCT | fields))
    assert caught.value.where == where
