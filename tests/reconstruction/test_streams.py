"""Pruned inputs, local and dense targets, and statistics behind pruned or recovered blocks, against whole models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import raysweep
from raysweep.pruning.recipe import MaskRecipe
from raysweep.reconstruction.measures import CALIBRATION
from raysweep.reconstruction.recovery import recover_unit, unit_names, units_in
from tests.families import FAMILIES, make_model
from tests.reconstruction.ranges import IDS, prune_all, range_of, reconstruct_trial, recover_all
from tests.reconstruction.streams import enter_all, hidden_states, linear_io, recovered_units, written

PRUNED_INPUT = {"input_stream": "pruned"}
families = pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])


def mean_square(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a.double() - b.double()) ** 2).mean())


@pytest.mark.parametrize("target", ["dense", "pruned"])
@pytest.mark.parametrize("granularity", ["subblock", "block", "window:2", "model"])
@families
def test_units_take_in_what_the_recovered_model_gives_and_are_compared_as_asked(family, granularity, target):
    model = make_model(family)
    dense = hidden_states(model)
    blocks = range_of(model)
    trial = reconstruct_trial(
        granularity=granularity, target_stream=target, learning_rate=0.002, **PRUNED_INPUT
    )
    for unit, before, result in recovered_units(blocks, trial):
        assert result is not None
        whole = unit.half is None
        if not (whole or unit.half == "mlp"):
            continue
        start, stop = hidden_states(before), hidden_states(written(blocks))
        if whole:
            wanted = dense[unit.stop]
            if (
                target == "pruned"
            ):  # the dense unit on the pruned input: dense weights from the unit's start on
                local = copy.deepcopy(before)
                for block in unit.blocks:
                    names = (
                        name for name, _ in local.named_parameters() if name.startswith(f"{block.prefix}.")
                    )
                    for name in names:
                        local.get_parameter(name).data = model.get_parameter(name).data
                wanted = hidden_states(local)[unit.stop]
            assert result.loss_before == pytest.approx(mean_square(start[unit.stop], wanted), rel=1e-4)
            assert result.loss_after == pytest.approx(mean_square(stop[unit.stop], wanted), rel=1e-4)
        elif target == "dense" and not FAMILIES[family].parallel:
            assert result.loss_after == pytest.approx(
                mean_square(stop[unit.stop], dense[unit.stop]), rel=1e-4
            )
        assert result.loss_after < result.loss_before
        torch.testing.assert_close(
            blocks.streams["trial"][CALIBRATION], stop[unit.stop], rtol=1e-4, atol=1e-5
        )


@families
def test_a_model_recovered_on_pruned_inputs_is_closer_than_one_recovered_on_dense_ones(family):
    """It corrects drift: that is what it is for."""
    dense = hidden_states(make_model(family))[-1]
    errors = {}
    for stream in ("dense", "pruned"):
        blocks, trial = (
            range_of(make_model(family)),
            reconstruct_trial(input_stream=stream, epochs=8, sparsity=0.7),
        )
        prune_all(blocks, "trial", trial)
        enter_all(blocks)
        for unit in unit_names(blocks, "subblock"):
            recover_unit(blocks, "trial", trial, unit)
        errors[stream] = mean_square(hidden_states(written(blocks))[-1], dense)
    assert errors["pruned"] < errors["dense"]


def statistics_before(model: torch.nn.Module, name: str) -> torch.Tensor:
    x, _ = linear_io(model, IDS, name)
    return x.double().T @ x.double()


@pytest.mark.parametrize("criterion", ["wanda", "ria", "sparsegpt"])
@families
def test_pruned_statistics_are_those_behind_pruned_blocks_before_any_of_the_own_block_is(family, criterion):
    """The public sequential procedure, on a whole model that is pruned block by block with dense masks of its own."""
    oracle = make_model(family)
    pruned = raysweep.prune(
        make_model(family), IDS, criterion=criterion, sparsity=0.5, statistics_stream="pruned"
    )
    reference = range_of(make_model(family), keep_halves=False)
    for index, block in reference.blocks.items():
        current = range_of(
            oracle, keep_halves=False
        )  # its dense statistics are those behind what is pruned so far
        now = current.blocks[index]
        for name, linear in now.linears.items():
            layer = current.pruner.layer(recipe(criterion), now, linear)
            assert layer is not None
            assert torch.equal(pruned.masks[name], layer.mask_OI), name
            expected = linear.as_stored(layer.masked(linear.weight_OI))
            torch.testing.assert_close(pruned.weights[f"{name}.weight"], expected, rtol=1e-4, atol=1e-5)
        for name in block.linears:
            oracle.get_parameter(f"{name}.weight").data = pruned.weights[f"{name}.weight"].clone()


def recipe(criterion: str) -> MaskRecipe:
    return MaskRecipe.of(reconstruct_trial(criterion=criterion))


@pytest.mark.parametrize("input_stream", ["dense", "pruned"])
@pytest.mark.parametrize("granularity", ["matrix", "subblock", "block", "window:2"])
def test_recovered_statistics_are_those_behind_recovered_units(granularity, input_stream):
    """Within a unit of several blocks those before are only pruned."""
    blocks = range_of(make_model("llama"))
    trial = reconstruct_trial(
        granularity=granularity, input_stream=input_stream, statistics_stream="recovered"
    )
    dense = make_model("llama")
    for unit, before, _ in recovered_units(blocks, trial):
        if not unit.opens_block:
            continue
        behind = copy.deepcopy(before)
        for block in unit.blocks:
            current = range_of(behind, keep_halves=False)
            now = current.blocks[block.index]
            for name, linear in now.linears.items():
                assert torch.equal(
                    linear.weight_OI, dense.get_parameter(f"{name}.weight")
                )  # none of it is pruned
                layer = current.pruner.layer(recipe("wanda"), now, linear)
                assert layer is not None
                assert torch.equal(blocks.layers["trial"][name].mask_OI, layer.mask_OI), name
            for name, linear in now.linears.items():
                mask_OI = blocks.layers["trial"][name].mask_OI
                behind.get_parameter(f"{name}.weight").data *= linear.as_stored(mask_OI)


def test_a_mask_does_not_depend_on_the_recovery_unless_the_trial_says_so():
    masks: dict[str, list[Any]] = {"dense": [], "pruned": [], "recovered": []}
    for stream, found in masks.items():
        for rate in (0.01, 0.05):
            blocks = range_of(make_model("llama"))
            trial = reconstruct_trial(statistics_stream=stream, learning_rate=rate)
            if stream == "pruned":
                enter_all(blocks)
                for block in blocks.blocks.values():
                    blocks.prune_on_stream("trial", "trial", MaskRecipe.of(trial), block)
                    blocks.advance_block("trial", "trial", block)
            if stream == "recovered":
                list(recovered_units(blocks, trial))
            else:
                recover_all(blocks, "trial", trial)
            found.append({name: layer.mask_OI for name, layer in blocks.layers["trial"].items()})
    same = {s: all(torch.equal(a[name], b[name]) for name in a) for s, (a, b) in masks.items()}
    assert same == {"dense": True, "pruned": True, "recovered": False}
    assert any(not torch.equal(masks["dense"][0][n], masks["pruned"][0][n]) for n in masks["dense"][0])


@pytest.mark.parametrize("fields", [{"targets": ("re:.*mlp",)}, {"sparsity": (("re:.*mlp", 0.5),)}])
@pytest.mark.parametrize("streams", [{}, PRUNED_INPUT])
def test_units_in_which_nothing_is_pruned_are_left_dense_and_the_stream_passes_them(fields, streams):
    blocks = range_of(make_model("llama"))
    trial = reconstruct_trial(granularity="subblock", **{**streams, **fields})
    results = {unit.name: result for unit, _, result in recovered_units(blocks, trial)}
    assert {name.rpartition(".")[2] for name, result in results.items() if result is not None} == {"mlp"}
    assert not any("self_attn" in name for name in blocks.weights["trial"])
    if streams:
        torch.testing.assert_close(
            blocks.streams["trial"][CALIBRATION], hidden_states(written(blocks))[-1], rtol=1e-4, atol=1e-5
        )


def test_matrices_that_are_not_pruned_are_left_dense_and_the_stream_passes_them():
    model = make_model("llama")
    blocks = range_of(model)
    trial = reconstruct_trial(granularity="matrix", targets=("up_proj", "self_attn.o_proj"), **PRUNED_INPUT)
    results = [result for _, _, result in recovered_units(blocks, trial)]
    done = [result.linears for result in results if result is not None]
    assert len(results) == len(units_in(blocks, "matrix"))
    assert {name.rpartition(".")[2] for name in done} == {"up_proj", "o_proj"}
    assert set(blocks.weights["trial"]) == {f"{name}.weight" for name in done}
    torch.testing.assert_close(
        blocks.streams["trial"][CALIBRATION], hidden_states(written(blocks))[-1], rtol=1e-4, atol=1e-5
    )
