"""What a range keeps of the dense pass, masks, errors by block; and that cutting a range changes no bit."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from raysweep.errors import NumericalError, UsageError
from raysweep.model.structure import Block
from raysweep.pruning.recipe import MaskRecipe
from raysweep.reconstruction.activations import batches
from raysweep.reconstruction.boundaries import INPUT
from raysweep.reconstruction.measures import CALIBRATION, VALIDATION, UnitResult
from raysweep.reconstruction.range import BlockRange
from tests.families import BLOCKS, FAMILIES, make_model
from tests.reconstruction.ranges import (
    IDS,
    SAMPLES,
    TOKENS,
    VALIDATION_IDS,
    load_ranges,
    mask_of,
    pass_text,
    prune_all,
    range_of,
    reconstruct_trial,
    recover_all,
)

CPU = torch.device("cpu")
WANDA = MaskRecipe.of(reconstruct_trial())

families = pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox", "phi"])


# The dense pass


@torch.no_grad()
def inputs_of(model: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """What every linear takes while the whole model runs on the calibration set, (N, I)."""
    taken: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, arguments, name=name: taken.update({name: arguments[0].clone()})
        )
        for name in names
    ]
    model(IDS)
    for handle in handles:
        handle.remove()
    return {name: x.reshape(-1, x.shape[-1]) for name, x in taken.items()}


@pytest.mark.parametrize("keep_halves", [True, False])
@families
def test_boundaries_are_the_whole_models_hidden_states(family, keep_halves):
    model = make_model(family)
    blocks = range_of(model, keep_halves=keep_halves)
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True).hidden_states
    kept = blocks.texts[CALIBRATION].activations
    assert kept.tokens == TOKENS
    for index in range(BLOCKS):  # the last of transformers' hidden states has passed the norm
        torch.testing.assert_close(kept.get(INPUT, index), expected[index], rtol=1e-6, atol=1e-6)
    logits = blocks.shard.logits(kept.get(INPUT, BLOCKS))
    with torch.no_grad():
        torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-6, atol=1e-6)
    per_block = 1 + keep_halves * (1 + FAMILIES[family].parallel)
    assert kept.nbytes == (BLOCKS * per_block + 1) * expected[0].nbytes


@pytest.mark.parametrize("keep_halves", [True, False])
@families
def test_statistics_are_those_of_every_linears_own_input(family, keep_halves):
    model = make_model(family)
    blocks = range_of(model, keep_halves=keep_halves)
    names = [name for block in blocks.blocks.values() for name in block.linears]
    for name, x_NI in inputs_of(model, names).items():
        block = next(block for block in blocks.blocks.values() if name in block.linears)
        statistics = blocks.statistics.of(CALIBRATION, block.linears[name], block)
        exact = x_NI.double()
        torch.testing.assert_close(statistics.gram_II.double(), exact.T @ exact, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics.sum_I.double(), exact.sum(0), rtol=1e-4, atol=1e-4)
        assert statistics.rows == SAMPLES * TOKENS


def test_a_text_in_several_batches_is_the_same_text():
    model = make_model("llama")
    at_once, in_parts = range_of(model), BlockRange(range_of(model).shard)
    for rows in (slice(0, 3), slice(3, 4), slice(4, SAMPLES)):
        in_parts.dense_pass(CALIBRATION, SAMPLES, rows, in_parts.shard.embed(IDS[rows]))
    assert (at_once.dense_batches, in_parts.dense_batches) == (1, 3)
    for index in range(BLOCKS + 1):
        torch.testing.assert_close(
            in_parts.texts[CALIBRATION].activations.get(INPUT, index),
            at_once.texts[CALIBRATION].activations.get(INPUT, index),
        )
    for block in at_once.blocks.values():
        for linear in block.linears.values():
            whole, parts = (one.statistics.of(CALIBRATION, linear, block) for one in (at_once, in_parts))
            torch.testing.assert_close(parts.gram_II, whole.gram_II, rtol=1e-5, atol=1e-4)
            assert parts.rows == whole.rows == SAMPLES * IDS.shape[1]


def test_batches_hold_about_2048_tokens_on_a_cpu_and_leave_nothing_out():
    assert batches(20, 256, CPU) == [slice(0, 8), slice(8, 16), slice(16, 20)]
    assert batches(2, 5000, CPU) == [slice(0, 1), slice(1, 2)]
    assert batches(64, 256, torch.device("cuda")) == [slice(0, 64)]


# Masks


@families
def test_pruned_weights_are_the_dense_ones_under_the_mask(family):
    model = make_model(family)
    blocks, trial = range_of(model), reconstruct_trial()
    prune_all(blocks, "trial", trial)
    for block in blocks.blocks.values():
        for name, linear in block.linears.items():
            mask_OI = mask_of(blocks, WANDA, linear.name)
            outputs, inputs = mask_OI.shape
            assert bool((mask_OI.sum(1) == inputs - inputs // 2).all())
            dense = model.get_parameter(f"{name}.weight")
            kept = mask_OI.T if linear.transposed else mask_OI
            stored = blocks.weights["trial"][f"{name}.weight"]
            assert stored.is_contiguous()
            assert torch.equal(stored, torch.where(kept, dense, 0.0))
            assert linear.transposed == (family == "gpt2")
            assert (outputs, inputs) == linear.weight_OI.shape


def test_masks_are_made_once_for_all_trials_that_share_them():
    blocks = range_of(make_model("llama"))
    linears = sum(len(block.linears) for block in blocks.blocks.values())
    prune_all(blocks, "first", reconstruct_trial(learning_rate=0.1))
    assert blocks.knowledge.made == linears
    prune_all(blocks, "second", reconstruct_trial(learning_rate=0.2, granularity="block", seed=5))
    assert blocks.knowledge.made == linears
    prune_all(blocks, "third", reconstruct_trial(sparsity=0.6))
    assert blocks.knowledge.made == 2 * linears


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"learning_rate": 0.5, "granularity": "matrix", "epochs": 9, "seed": 4}, True),
        ({"sparsity": 0.51}, False),
        ({"criterion": "magnitude"}, False),
        ({"comparison_group": "matrix"}, False),
        ({"sparsity": None, "pattern": "2:4"}, False),
        ({"criterion": "random", "seed": 0}, False),
    ],
)
def test_a_masks_recipe_is_what_the_mask_depends_on(changes, same):
    assert (MaskRecipe.of(reconstruct_trial(**changes)) == WANDA) == same


def test_the_seed_is_part_of_a_random_masks_recipe():
    first, second = (MaskRecipe.of(reconstruct_trial(criterion="random", seed=seed)) for seed in (1, 2))
    assert first != second


def test_scores_that_are_not_finite_name_their_linear():
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    blocks = range_of(model, keep_halves=False)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj: scores are not finite"):
        prune_all(blocks, "trial", reconstruct_trial(criterion="magnitude"))


def test_a_pattern_must_divide_the_inputs():
    blocks = range_of(make_model("llama"))
    with pytest.raises(UsageError, match="needs a number of inputs that 5 divides, not 32"):
        prune_all(blocks, "trial", reconstruct_trial(sparsity=None, pattern="2:5"))


@families
def test_rows_of_linears(family):
    """Output error before recovery against the products themselves, in float64."""
    model = make_model(family)
    blocks = range_of(model)
    taken = inputs_of(model, [name for block in blocks.blocks.values() for name in block.linears])
    prune_all(blocks, "trial", reconstruct_trial())
    for block in blocks.blocks.values():
        rows = blocks.linear_rows("trial", block)
        assert [row["unit"] for row in rows] == list(block.linears)
        for row in rows:
            linear = block.linears[str(row["unit"])]
            mask_OI, weight_OI = mask_of(blocks, WANDA, linear.name), linear.weight_OI.double()
            x_NI = taken[linear.name].double()
            output_NO = x_NI @ weight_OI.T + (0 if linear.bias_O is None else linear.bias_O.double())
            change_NO = x_NI @ (weight_OI * ~mask_OI).T
            assert row["error_before"] == pytest.approx(
                float((change_NO**2).sum() / (output_NO**2).sum()), rel=1e-4
            )
            assert row["realized_sparsity"] == pytest.approx(float((~mask_OI).double().mean()), abs=1e-12)
            assert row["dead_inputs"] == int((x_NI == 0).all(0).sum())
            assert (row["kind"], row["block"], row["linears"]) == ("linear", block.index, linear.name)


# Trials in flight


def test_a_trials_weights_are_in_place_within_the_context_only():
    model = make_model("llama")
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    blocks = range_of(model)
    prune_all(blocks, "trial", reconstruct_trial())
    pruned = blocks.weights["trial"]

    def look_and_fail() -> None:
        with blocks.using("trial", blocks.blocks[1]):
            for name, parameter in model.named_parameters():
                inside = name.startswith("model.layers.1.") and name in pruned
                assert torch.equal(parameter, pruned[name] if inside else dense[name])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look_and_fail()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense[name])
    with blocks.using(None, blocks.blocks[1]):
        assert torch.equal(
            model.model.layers[1].mlp.up_proj.weight, dense["model.layers.1.mlp.up_proj.weight"]
        )


@families
def test_errors_of_blocks_are_those_of_the_whole_pruned_model(family):
    """Against a copy of the model with the trial's weights written into it."""
    blocks, trial = range_of(make_model(family), validation=True), reconstruct_trial()
    recover_all(blocks, "trial", trial)
    for text, ids in ((CALIBRATION, IDS), (VALIDATION, VALIDATION_IDS)):
        sums: dict[int, list[float]] = {}
        for rows in batches(len(ids), TOKENS, CPU):
            for index, found in blocks.forward("trial", text, rows, blocks.shard.embed(ids[rows]))[1].items():
                sums.setdefault(index, []).extend(found)
        assert {len(found) for found in sums.values()} == {len(ids)}
        errors = {index: math.fsum(found) / blocks.target_power(text, index) for index, found in sums.items()}
        copied = make_model(family)
        for name, weight in blocks.weights["trial"].items():
            copied.get_parameter(name).data = weight.clone()
        with torch.no_grad():
            dense = make_model(family)(ids, output_hidden_states=True).hidden_states
            pruned = copied(ids, output_hidden_states=True).hidden_states
        assert list(errors) == list(range(BLOCKS))
        for index in range(BLOCKS - 1):  # the last hidden state of transformers has passed the norm
            a, b = pruned[index + 1].double(), dense[index + 1].double()
            assert errors[index] == pytest.approx(float(((a - b) ** 2).sum() / (b**2).sum()), rel=1e-4)
    blocks.release("trial")
    blocks.release("trial")
    assert "trial" not in blocks.weights


NO_ERRORS = {index: [0.0] * SAMPLES for index in range(BLOCKS)}


def test_the_dense_model_has_no_errors():
    blocks = range_of(make_model("llama"))
    hidden, errors = blocks.forward(None, CALIBRATION, slice(0, SAMPLES), blocks.shard.embed(IDS))
    assert torch.equal(hidden, blocks.texts[CALIBRATION].activations.get(INPUT, BLOCKS))
    assert errors == {}
    blocks.begin("same")
    _, errors = blocks.forward("same", CALIBRATION, slice(0, SAMPLES), blocks.shard.embed(IDS))
    assert errors == NO_ERRORS


def test_what_is_as_in_the_dense_model_is_not_computed_again(monkeypatch):
    """Only the second block is pruned: the first one does not run, and no number differs."""
    blocks, rows = range_of(make_model("llama")), slice(0, SAMPLES)
    for name in ("whole", "spared"):
        blocks.begin(name)
        blocks.prune(name, WANDA, blocks.blocks[1])
    whole, errors = blocks.forward("whole", CALIBRATION, rows, blocks.shard.embed(IDS))
    ran: list[int] = []
    run = Block.run
    monkeypatch.setattr(
        Block, "run", lambda block, *arguments: ran.append(block.index) or run(block, *arguments)
    )
    spared, spared_errors = blocks.forward("spared", CALIBRATION, rows, None)
    assert torch.equal(spared, whole)
    assert spared_errors == errors
    assert ran == list(range(1, BLOCKS))
    blocks.begin("dense")
    assert blocks.forward("dense", CALIBRATION, rows, None) == (None, NO_ERRORS)
    assert ran == list(range(1, BLOCKS))
    assert torch.equal(
        blocks.dense_output(CALIBRATION, rows), blocks.texts[CALIBRATION].activations.get(INPUT, BLOCKS)
    )


def test_another_calibration_set_begins_anew():
    model = make_model("llama")
    blocks, trial = range_of(model), reconstruct_trial()
    recover_all(blocks, "before", trial)
    blocks.release("before")
    blocks.forget_texts()
    assert blocks.texts == {}
    pass_text([blocks], CALIBRATION, VALIDATION_IDS)
    fresh = BlockRange(range_of(make_model("llama")).shard)
    pass_text([fresh], CALIBRATION, VALIDATION_IDS)
    assert recover_all(blocks, "after", trial) == recover_all(fresh, "after", trial)


# A range that is cut


def numbers_of(ranges: list[BlockRange], **fields: Any) -> dict[str, Any]:
    """All numbers of a trial through ranges that follow one another."""
    trial = reconstruct_trial(**fields)
    units: list[UnitResult] = [unit for blocks in ranges for unit in recover_all(blocks, "trial", trial)]
    outputs, errors = [], []
    for text, ids in ((CALIBRATION, IDS), (VALIDATION, VALIDATION_IDS)):
        for rows in batches(len(ids), TOKENS, CPU):
            hidden = ranges[0].shard.embed(ids[rows])
            for blocks in ranges:
                hidden, found = blocks.forward("trial", text, rows, hidden)
                errors += found.items()
            outputs.append(ranges[-1].shard.logits(hidden))
    return {
        "units": units,
        "weights": {k: w for blocks in ranges for k, w in sorted(blocks.weights["trial"].items())},
        "linears": [
            row
            for blocks in ranges
            for block in blocks.blocks.values()
            for row in blocks.linear_rows("trial", block)
        ],
        "errors": errors,
        "powers": [
            blocks.target_power(text, index)
            for text in (CALIBRATION, VALIDATION)
            for blocks in ranges
            for index in blocks.blocks
        ],
        "logits": torch.cat(outputs),
    }


@pytest.fixture(scope="module")
def uncut(tiny_llama) -> Callable[[str], dict[str, Any]]:
    """uncut(granularity): the numbers of a trial through one range."""
    return cache(lambda granularity: numbers_of(load_ranges(tiny_llama, [0, 4]), granularity=granularity))


@pytest.mark.parametrize(
    ("granularity", "cuts"),
    [("matrix", [0, 2, 4]), ("subblock", [0, 1, 3, 4]), ("block", [0, 2, 4]), ("subblock", [0, 2, 4])],
    ids=str,
)
def test_cutting_a_range_changes_no_bit(tiny_llama, uncut, cuts, granularity):
    whole = uncut(granularity)
    parts = numbers_of(load_ranges(tiny_llama, cuts), granularity=granularity)
    assert parts["units"] == whole["units"]
    assert parts["linears"] == whole["linears"]
    assert parts["errors"] == whole["errors"]
    assert torch.equal(parts["logits"], whole["logits"])
    assert parts["weights"].keys() == whole["weights"].keys()
    for name, weight in whole["weights"].items():
        assert torch.equal(parts["weights"][name], weight)


def test_keeping_halves_for_other_trials_changes_no_bit():
    trial = reconstruct_trial(granularity="block")
    with_halves = range_of(make_model("gemma2"), keep_halves=True)
    without = range_of(make_model("gemma2"), keep_halves=False)
    assert recover_all(with_halves, "trial", trial) == recover_all(without, "trial", trial)


def test_little_room_for_knowledge_costs_time_and_changes_no_bit():
    ample, scarce = range_of(make_model("llama")), range_of(make_model("llama"))
    scarce.knowledge.limit_bytes = 100
    for granularity in ("matrix", "subblock"):
        trial = reconstruct_trial(granularity=granularity)
        assert recover_all(scarce, granularity, trial) == recover_all(ample, granularity, trial)
        for name, weight in ample.weights[granularity].items():
            assert torch.equal(scarce.weights[granularity][name], weight)
    assert scarce.knowledge.made > ample.knowledge.made


def test_a_range_is_gone_with_its_last_user():
    """Python's look for cycles may come late, and what it holds on a device is large."""
    blocks = range_of(make_model("llama"))
    assert blocks.statistics.rows(
        CALIBRATION, next(iter(blocks.blocks[0].linears.values())), blocks.blocks[0]
    )
    seen = weakref.ref(blocks)
    gc.disable()
    try:
        del blocks
        assert seen() is None
    finally:
        gc.enable()
