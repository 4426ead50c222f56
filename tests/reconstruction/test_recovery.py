"""Recovered weights and errors against a naive PyTorch loop on activations taken from the whole model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from raysweep.errors import NumericalError
from raysweep.reconstruction.measures import CALIBRATION
from raysweep.reconstruction.objectives import objective_of
from raysweep.reconstruction.optimizer import MaskedOptimizer
from raysweep.reconstruction.recovery import recover_unit, unit_names, units_in
from tests.families import FAMILIES, in_family, make_model
from tests.reconstruction.ranges import (
    IDS,
    SAMPLES,
    VALIDATION_IDS,
    masks_of,
    pass_text,
    prune_all,
    range_of,
    reconstruct_trial,
    recover_all,
)

BLOCK = 1  # the one that is looked at

# The naive loop


class Half(nn.Module):
    """x + branch(x), of the modules that the branch consists of and nothing else."""

    def __init__(self, branch: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self, x)


def llama_halves(layer: nn.Module, keywords: dict[str, Any]) -> dict[str, nn.Module]:
    return {
        "attention": Half(
            lambda own, x: own.self_attn(own.input_layernorm(x), **keywords)[0],
            self_attn=layer.self_attn,
            input_layernorm=layer.input_layernorm,
        ),
        "mlp": Half(
            lambda own, x: own.mlp(own.post_attention_layernorm(x)),
            mlp=layer.mlp,
            post_attention_layernorm=layer.post_attention_layernorm,
        ),
    }


def opt_halves(layer: nn.Module, keywords: dict[str, Any]) -> dict[str, nn.Module]:
    return {
        "attention": Half(
            lambda own, x: own.self_attn(own.self_attn_layer_norm(x), **keywords)[0],
            self_attn=layer.self_attn,
            self_attn_layer_norm=layer.self_attn_layer_norm,
        ),
        "mlp": Half(
            lambda own, x: own.fc2(functional.relu(own.fc1(own.final_layer_norm(x)))),
            fc1=layer.fc1,
            fc2=layer.fc2,
            final_layer_norm=layer.final_layer_norm,
        ),
    }


def neox_halves(layer: nn.Module, keywords: dict[str, Any]) -> dict[str, nn.Module]:
    return {
        "attention": Half(
            lambda own, x: own.attention(own.input_layernorm(x), **keywords)[0],
            attention=layer.attention,
            input_layernorm=layer.input_layernorm,
        ),
        "mlp": Half(
            lambda own, x: own.mlp(own.post_attention_layernorm(x)),
            mlp=layer.mlp,
            post_attention_layernorm=layer.post_attention_layernorm,
        ),
    }


HALVES = {"llama": llama_halves, "opt": opt_halves, "gpt_neox": neox_halves}


@torch.no_grad()
def hooked(model: nn.Module, ids: Tensor, *modules: nn.Module) -> list[dict[str, Any]]:
    """What every module took and gave while the whole model ran."""
    seen: list[dict[str, Any]] = [{} for _ in modules]

    def hook(
        place: dict[str, Any], arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        taken = arguments[0] if arguments else keywords["hidden_states"]
        given = output[0] if isinstance(output, tuple) else output
        place.update(input=taken.clone(), output=given.clone(), keywords=dict(keywords))

    handles = [
        module.register_forward_hook(
            lambda _module, arguments, keywords, output, place=place: hook(
                place, arguments, keywords, output
            ),
            with_kwargs=True,
        )
        for module, place in zip(modules, seen, strict=True)
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


def naive_recovery(
    module: nn.Module,
    masks: dict[str, Tensor],
    x: Tensor,
    target: Tensor,
    *,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    warmup_fraction: float,
    max_grad_norm: float | None = None,
    trained: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """W * mask written out, plain AdamW, the schedule written out, samples in their own order."""
    theta = {name: p.detach().clone().requires_grad_(trained(name)) for name, p in module.named_parameters()}
    leaves = [leaf for leaf in theta.values() if leaf.requires_grad]
    optimizer = torch.optim.AdamW(
        leaves, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=False, fused=False
    )
    starts = range(0, x.shape[0], batch_size)
    total, step = epochs * len(starts), 0
    warmup = int(warmup_fraction * total)
    for _ in range(epochs):
        for start in starts:
            rows = slice(start, start + batch_size)
            weights = {name: leaf * masks.get(name, 1) for name, leaf in theta.items()}
            output = functional_call(module, weights, (x[rows],))
            optimizer.zero_grad()
            ((output - target[rows]) ** 2).mean().backward()
            if max_grad_norm is not None:
                norm = math.sqrt(sum(float((leaf.grad**2).sum()) for leaf in leaves))
                for leaf in leaves:
                    leaf.grad *= min(1.0, max_grad_norm / norm)
            rises = step < warmup
            factor = step / warmup if rises else (total - step) / (total - warmup)
            optimizer.param_groups[0]["lr"] = learning_rate * factor
            optimizer.step()
            step += 1
    return {name: (leaf * masks.get(name, 1)).detach() for name, leaf in theta.items()}


def naive_error(module: nn.Module, weights: dict[str, Tensor], x: Tensor, target: Tensor) -> float:
    """Mean over tokens and outputs of the squared difference, in float64."""
    module = copy.deepcopy(module).double()
    with torch.no_grad():
        output = functional_call(module, {name: w.double() for name, w in weights.items()}, (x.double(),))
    return float(((output - target.double()) ** 2).mean())


def local_names(module: nn.Module, full: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of `full` (by full name) under the module's own names."""
    names = [name for name, _ in module.named_parameters()]
    return {name: full[f"{prefix}{name}"] for name in names if f"{prefix}{name}" in full}


@torch.no_grad()
def naive_flow(
    halves: dict[str, nn.Module], x: Tensor, output: Tensor, parallel: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """By half, its dense input and target, once the halves have been seen to make up the block."""
    middle = halves["attention"](x)
    mlp_input = x if parallel else middle
    mlp_target = halves["mlp"](mlp_input)
    torch.testing.assert_close(middle + mlp_target - x if parallel else mlp_target, output)
    return {"attention": (x, middle), "mlp": (mlp_input, mlp_target)}


def without_key_bias(name: str, tensor: Tensor) -> Tensor:
    """Softmax does not see the bias of keys: its gradients are rounding, which AdamW makes steps of."""
    if name.endswith("k_proj.bias"):
        return tensor[:0]
    if name.endswith("query_key_value.bias"):  # by head: query, key, value
        return tensor.view(4, 3, 8)[:, [0, 2]]
    return tensor


SETTINGS = [
    {"learning_rate": 0.01, "epochs": 2, "batch_size": 3, "warmup_fraction": 0.3},
    {"learning_rate": 0.003, "epochs": 3, "batch_size": 7, "warmup_fraction": 0.0, "max_grad_norm": 0.01},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["partial-batches", "clipped"])
@pytest.mark.parametrize("unit", ["attention", "mlp"])
@pytest.mark.parametrize("family", HALVES)
def test_a_subblock_equals_the_naive_loop(family, unit, settings):
    model = make_model(family)
    layer = model.get_submodule(FAMILIES[family].blocks)[BLOCK]
    (whole,) = hooked(model, IDS, layer)
    keywords = {key: whole["keywords"][key] for key in ("position_embeddings",) if key in whole["keywords"]}
    halves = HALVES[family](copy.deepcopy(layer), keywords | {"attention_mask": None})
    x, target = naive_flow(halves, whole["input"], whole["output"], FAMILIES[family].parallel)[unit]

    blocks, trial = range_of(model), reconstruct_trial(shuffle=False, **settings)
    masks = local_names(halves[unit], masks_of(blocks, trial), f"{FAMILIES[family].blocks}.{BLOCK}.")
    expected = naive_recovery(halves[unit], masks, x, target, **settings)
    prune_all(blocks, "trial", trial)
    result = recover_unit(blocks, "trial", trial, f"{BLOCK}.{unit}")

    weights = local_names(halves[unit], blocks.weights["trial"], f"{FAMILIES[family].blocks}.{BLOCK}.")
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        pair = without_key_bias(name, weight), without_key_bias(name, expected[name])
        torch.testing.assert_close(*pair, rtol=0, atol=1e-5)
    dense = dict(halves[unit].named_parameters())
    pruned = {name: weight * masks.get(name, 1) for name, weight in dense.items()}
    assert result.loss_before == pytest.approx(naive_error(halves[unit], pruned, x, target), rel=1e-5)
    assert result.loss_after == pytest.approx(naive_error(halves[unit], weights, x, target), rel=1e-5)
    power = float((target.double() ** 2).mean())
    assert result.error_before == pytest.approx(result.loss_before / power, rel=1e-5)
    assert result.error_after == pytest.approx(result.loss_after / power, rel=1e-5)
    assert result.loss_after < 0.9 * result.loss_before
    assert result.steps == settings["epochs"] * math.ceil(SAMPLES / settings["batch_size"])
    assert result.trainable_parameters == sum(weight.numel() for weight in dense.values())


@pytest.mark.parametrize("trainable", ["all", "weights"])
def test_a_block_equals_the_naive_loop(trainable):
    model = make_model("llama")
    layer = model.model.layers[BLOCK]
    (whole,) = hooked(model, IDS, layer)
    keywords = {"position_embeddings": whole["keywords"]["position_embeddings"], "attention_mask": None}
    halves = llama_halves(copy.deepcopy(layer), keywords)
    both = nn.Sequential(halves["attention"], halves["mlp"])
    settings = SETTINGS[0]
    blocks = range_of(model, keep_halves=False)
    trial = reconstruct_trial(granularity="block", shuffle=False, trainable=trainable, **settings)

    def full_name(name: str) -> str:
        return f"model.layers.{BLOCK}.{name.partition('.')[2]}"

    all_masks = masks_of(blocks, trial)
    masks = {
        name: all_masks[full_name(name)]
        for name, _ in both.named_parameters()
        if full_name(name) in all_masks
    }
    only = (lambda name: name in masks) if trainable == "weights" else (lambda name: True)
    expected = naive_recovery(both, masks, whole["input"], whole["output"], trained=only, **settings)
    prune_all(blocks, "trial", trial)
    recover_unit(blocks, "trial", trial, f"{BLOCK}")
    for name, weight in expected.items():
        recovered = blocks.weights["trial"].get(full_name(name))
        assert (recovered is None) == (trainable == "weights" and "norm" in name)
        if recovered is not None:
            torch.testing.assert_close(recovered, weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_matrices_equal_the_naive_loop_on_the_dense_models_inputs(family):
    """All of a block in one trial: what is recovered first must not change the inputs of what comes later."""
    model = make_model(family)
    prefix = f"{FAMILIES[family].blocks}.{BLOCK}."
    settings = SETTINGS[0]
    blocks, trial = range_of(model), reconstruct_trial(granularity="matrix", shuffle=False, **settings)
    names = list(blocks.blocks[BLOCK].linears)
    modules = [copy.deepcopy(model.get_submodule(name)) for name in names]
    taken = hooked(model, IDS, *(model.get_submodule(name) for name in names))
    results = {result.linears: result for result in recover_all(blocks, "trial", trial)}
    for name, module, seen in zip(names, modules, taken, strict=True):
        x, target = seen["input"].reshape(SAMPLES, -1, seen["input"].shape[-1]), seen["output"]
        target = target.reshape(*x.shape[:2], -1)
        masks = {"weight": masks_of(blocks, trial)[f"{name}.weight"]}
        expected = naive_recovery(module, masks, x, target, **settings)
        weights = local_names(module, blocks.weights["trial"], f"{name}.")
        assert weights.keys() == expected.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-5, msg=f"{name}.{key}")
        result, dense = results[name], dict(module.named_parameters())
        pruned = dense | {"weight": dense["weight"] * masks["weight"]}
        assert result.unit == f"{BLOCK}.{name.removeprefix(prefix)}"
        assert result.loss_before == pytest.approx(naive_error(module, pruned, x, target), rel=1e-4)
        assert result.loss_after == pytest.approx(naive_error(module, weights, x, target), rel=1e-4)
        power = float((target.double() ** 2).mean())
        assert result.error_after == pytest.approx(result.loss_after / power, rel=1e-4)
        assert result.loss_after < result.loss_before


@pytest.mark.parametrize("granularity", ["matrix", "subblock", "block"])
def test_validation_losses_are_those_of_the_validation_text(granularity):
    """They equal the calibration losses of a range that is calibrated on the validation text."""
    trial = reconstruct_trial(granularity=granularity, criterion="magnitude", comparison_group="row")
    blocks = range_of(make_model("llama"), validation=True)
    results = recover_all(blocks, "trial", trial)
    swapped = range_of(make_model("llama"))
    swapped.forget_texts()
    pass_text([swapped], CALIBRATION, VALIDATION_IDS)
    prune_all(swapped, "trial", trial)
    units = units_in(swapped, granularity)
    for unit, result in zip(units, results, strict=True):
        objective = objective_of(swapped, "trial", trial, unit)
        assert objective.error(CALIBRATION).loss == pytest.approx(result.validation_loss_before, rel=1e-5)
    swapped.weights["trial"] = blocks.weights["trial"]
    for unit, result in zip(units, results, strict=True):
        objective = objective_of(swapped, "trial", trial, unit)
        assert objective.error(CALIBRATION).loss == pytest.approx(result.validation_loss_after, rel=1e-5)
        assert result.validation_loss_after != pytest.approx(result.loss_after, rel=0.01)


# Which parameters change


@pytest.mark.parametrize("granularity", ["matrix", "subblock", "block"])
@pytest.mark.parametrize("trainable", ["all", "weights"])
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_what_is_trained(family, granularity, trainable):
    """`weights`: the prunable weights alone. `all`: also biases and, where a unit has them, norms."""
    model = make_model(family)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    blocks, trial = range_of(model), reconstruct_trial(granularity=granularity, trainable=trainable)
    results = recover_all(blocks, "trial", trial)
    weights, masks = blocks.weights["trial"], masks_of(blocks, trial)
    in_blocks = {name for name in dense if name.startswith(FAMILIES[family].blocks)}
    norms = {name for name in in_blocks if "norm" in name or ".ln_" in name}
    expected = {
        ("matrix", "all"): in_blocks - norms,
        ("subblock", "all"): in_blocks,
        ("block", "all"): in_blocks,
    }.get((granularity, trainable), set(masks))
    assert set(weights) == expected
    for name, weight in weights.items():
        assert not torch.equal(weight, dense[name] * masks.get(name, 1)), name
    assert sum(result.trainable_parameters for result in results) == sum(w.numel() for w in weights.values())
    for name, parameter in model.named_parameters():  # and the model itself is as it was
        assert torch.equal(parameter, dense[name])
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_a_subblock_leaves_the_other_half_alone():
    blocks, trial = range_of(make_model("llama")), reconstruct_trial()
    prune_all(blocks, "trial", trial)
    before = {name: weight.clone() for name, weight in blocks.weights["trial"].items()}
    recover_unit(blocks, "trial", trial, f"{BLOCK}.attention")
    after = blocks.weights["trial"]
    changed = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
    prefix = f"model.layers.{BLOCK}."
    attention = {f"{prefix}self_attn.{short}.weight" for short in FAMILIES["llama"].attention}
    assert changed == attention | {f"{prefix}input_layernorm.weight"}


@pytest.mark.parametrize("family", ["phi", "falcon", "gptj"])
def test_a_norm_that_both_halves_read_is_trained_with_the_block_only(family):
    shared = {f"{FAMILIES[family].blocks}.{BLOCK}.{name}" for name in FAMILIES[family].shared}
    blocks = range_of(make_model(family))
    recover_all(blocks, "halves", reconstruct_trial())
    assert not shared & blocks.weights["halves"].keys()
    recover_all(blocks, "blocks", reconstruct_trial(granularity="block"))
    assert shared <= blocks.weights["blocks"].keys()


@pytest.mark.parametrize(
    ("family", "granularity"), [("llama", "matrix"), ("phi", "subblock"), ("opt", "block")]
)
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_trials_do_not_depend_on_those_before_them(family, granularity, criterion):
    """What trials share, whichever made it, is what each would have made alone."""
    first = reconstruct_trial(granularity=granularity, learning_rate=0.03, criterion=criterion)
    second = reconstruct_trial(granularity=granularity, learning_rate=0.01, criterion=criterion)
    together = range_of(make_model(family))
    recover_all(together, "first", first)
    results = recover_all(together, "second", second)
    alone = range_of(make_model(family))
    assert recover_all(alone, "second", second) == results
    for name, weight in alone.weights["second"].items():
        assert torch.equal(weight, together.weights["second"][name])


# Removed weights are zero, all the time


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "granularity", "mask"),
    [
        ("llama", "matrix", {"sparsity": 0.7}),
        ("llama", "subblock", {"sparsity": None, "pattern": "2:4"}),
        ("gpt2", "block", {"criterion": "magnitude", "comparison_group": "matrix"}),
        ("gpt2", "matrix", {"criterion": "random"}),
    ],
)
def test_removed_weights_are_exactly_zero_after_every_step(monkeypatch, family, granularity, mask, dtype):
    blocks = range_of(make_model(family).to(dtype))
    trial = reconstruct_trial(granularity=granularity, **mask)
    step, seen = MaskedOptimizer.step, {"steps": 0, "masked": 0}

    def checked_step(self: MaskedOptimizer, factor: float, clip: float) -> None:
        zero = [(tensor == 0) for tensor in (*self.parameters, *self.masters)]
        step(self, factor, clip)
        for before, tensor in zip(zero, (*self.parameters, *self.masters), strict=True):
            assert not bool(tensor[before].count_nonzero())
            seen["masked"] += int(before.sum())
        assert all(master.dtype == torch.float32 for master in self.masters)
        seen["steps"] += 1

    monkeypatch.setattr(MaskedOptimizer, "step", checked_step)
    results = recover_all(blocks, "trial", trial)
    masks = masks_of(blocks, trial)
    removed = sum(int((~kept).sum()) for kept in masks.values())
    steps_a_unit = 2 * 3
    assert seen["steps"] == steps_a_unit * len(results)
    assert seen["masked"] >= 2 * removed * steps_a_unit
    for name, kept in masks.items():
        weight = blocks.weights["trial"][name]
        assert weight.dtype == dtype
        assert not bool(weight[~kept].count_nonzero())
        assert bool(weight[kept].count_nonzero() > 0.9 * kept.sum())


def test_bfloat16_recovers_about_as_well_as_float32():
    """Without float32 masters most steps at this learning rate would be rounded away."""
    trial = reconstruct_trial(learning_rate=0.001, epochs=6)
    exact = recover_all(range_of(make_model("llama")), "trial", trial)
    low = recover_all(range_of(make_model("llama").to(torch.bfloat16)), "trial", trial)
    for full, half in zip(exact, low, strict=True):
        assert half.loss_after == pytest.approx(full.loss_after, rel=0.1)
        assert half.loss_after < 0.95 * half.loss_before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("granularity", "rate"), [("matrix", 1e20), ("subblock", 1e6), ("block", 1e6)])
def test_divergence_is_an_error_and_leaves_the_model_alone(granularity, rate, dtype):
    model = make_model("llama").to(dtype)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    trial = reconstruct_trial(granularity=granularity, learning_rate=rate, warmup_fraction=0.0)
    with pytest.raises(NumericalError, match="not finite"):
        recover_all(range_of(model), "trial", trial)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense[name])
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_units_are_named_in_the_order_in_which_they_run():
    blocks = range_of(make_model("llama"))
    assert unit_names(blocks, "block") == ["0", "1", "2"]
    assert unit_names(blocks, "subblock")[:3] == ["0.attention", "0.mlp", "1.attention"]
    shorts = [name for group in FAMILIES["llama"].groups for name in group]
    matrices = unit_names(blocks, "matrix")
    assert len(matrices) == 3 * len(shorts)
    assert all(in_family((short,), name) for short, name in zip(shorts * 3, matrices, strict=True))
