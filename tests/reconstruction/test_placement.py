"""Wherever weights, activations and statistics wait: the same numbers, to the last bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from raysweep import at_once
from raysweep.config.trial import Trial
from raysweep.errors import StorageError
from raysweep.model.checkpoint import ModelSource
from raysweep.model.shard import ModelShard
from raysweep.reconstruction.activations import batches
from raysweep.reconstruction.measures import CALIBRATION, VALIDATION
from raysweep.reconstruction.placement import Placement
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.recovery import recover_unit, unit_names
from raysweep.reconstruction.stores import Store
from tests.families import FAMILIES, make_model
from tests.reconstruction.ranges import IDS, VALIDATION_IDS, prune_all, reconstruct_trial
from tests.zoo import make_zoo_model

TEXTS = {CALIBRATION: IDS, VALIDATION: VALIDATION_IDS}

PLACEMENTS = {
    "files": Placement(weights="files"),
    "host": Placement(weights="host", trials="host", statistics="host"),
    "disk": Placement(weights="files", trials="disk", activations="disk", statistics="disk"),
    "anew": Placement(weights="files", trials="disk", statistics="anew", every=2, halves=False),
    "no halves": Placement(halves=False),
    "one boundary": Placement(every=100),
}

TRIALS = {
    "subblock": reconstruct_trial(),
    "matrix": reconstruct_trial(granularity="matrix"),
    "window": reconstruct_trial(granularity="window:2", criterion="sparsegpt"),
    "lora": reconstruct_trial(granularity="block", trainable="lora+norms", lora_rank=2, lora_alpha=4.0),
    "exact": reconstruct_trial(
        granularity="matrix", optimizer="exact", learning_rate=None, epochs=None, batch_size=None
    ),
    "streams": reconstruct_trial(input_stream="pruned", statistics_stream="recovered"),
    "local": reconstruct_trial(input_stream="pruned", target_stream="pruned", granularity="block"),
}


def all_of(folder: Path, trial: Trial, placement: Placement, device: str = "cpu") -> dict[str, Any]:
    """Every number that a trial leaves in a range: of its units and linears, of its evaluation, and its weights."""
    shard = ModelShard.load(ModelSource(str(folder)), dtype="float32", device=device, waits=placement.waits)
    blocks = BlockRange(shard, placement=placement)
    for text, ids_ST in TEXTS.items():
        pass_text(blocks, text, ids_ST)
    if trial.statistics_stream == "recovered":
        blocks.begin("trial")
    else:
        prune_all(blocks, "trial", trial)
    if trial.is_sequential:
        for text, ids_ST in TEXTS.items():
            blocks.enter_stream("trial", text, len(ids_ST), slice(0, len(ids_ST)), blocks.shard.embed(ids_ST))
    units = [
        recover_unit(blocks, "trial", trial, unit) for unit in unit_names(blocks, str(trial.granularity))
    ]
    rows = [row for block in blocks.blocks.values() for row in blocks.linear_rows("trial", block)]
    passed = [
        blocks.forward("trial", text, rows, None)
        for text, ids_ST in TEXTS.items()
        for rows in batches(*ids_ST.shape, blocks.device)
    ]
    powers = [blocks.target_power(CALIBRATION, index) for index in blocks.blocks]
    weights = {full: tensor.cpu().clone() for full, tensor in blocks.weights["trial"].items()}
    blocks.release("trial")
    return {
        "units": [asdict(unit) for unit in units if unit is not None],
        "rows": rows,
        "errors": [errors for _, errors in passed],
        "outputs": [hidden for hidden, _ in passed],
        "powers": powers,
        "weights": weights,
    }


def pass_text(blocks: BlockRange, text: str, ids_ST: torch.Tensor) -> None:
    samples, tokens = ids_ST.shape
    for rows in batches(samples, tokens, blocks.device):
        hidden_BTH = blocks.shard.embed(ids_ST[rows])
        if blocks.placement.by_block:
            blocks.enter_dense(text, samples, rows, hidden_BTH)
        else:
            blocks.dense_pass(text, samples, rows, hidden_BTH)
    for index in blocks.blocks if blocks.placement.by_block else ():
        blocks.pass_block(text, index)


def _pairs() -> Iterator[Any]:
    """All kinds on one family, one kind on all; the others take long."""
    for family in ("llama", "gpt2", "gpt_neox", "mixtral"):
        for kind in TRIALS:
            is_short = family == "llama" or kind == "subblock"
            yield pytest.param(family, kind, marks=() if is_short else pytest.mark.long)


@pytest.mark.parametrize(("family", "kind"), list(_pairs()))
def test_where_things_wait_changes_no_number(family: str, kind: str, tmp_path: Path) -> None:
    trial = TRIALS[kind]
    if family == "mixtral" and kind in ("matrix", "exact"):
        pytest.skip("matrices of experts see other numbers of tokens")
    make = make_model if family in FAMILIES else make_zoo_model
    make(family).save_pretrained(tmp_path / "model")
    expected = all_of(tmp_path / "model", trial, Placement())
    assert expected["units"]
    assert any(map(bool, expected["errors"]))
    for name, placement in PLACEMENTS.items():
        found = all_of(tmp_path / "model", trial, placement)
        for part, value in expected.items():
            if part in ("weights", "outputs"):
                pairs = zip(_tensors(value), _tensors(found[part]), strict=True)
                assert all(torch.equal(one, other) for one, other in pairs), (name, part)
            else:
                assert found[part] == value, (name, part)


@pytest.mark.parametrize("place", PLACEMENTS)
def test_batches_that_pass_together_give_what_they_give_alone(
    place: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(at_once, "CPU_BATCH_TOKENS", 2 * IDS.shape[1])
    make_model("llama").save_pretrained(tmp_path)
    placement = PLACEMENTS[place]
    shard = ModelShard.load(ModelSource(str(tmp_path)), dtype="float32", waits=placement.waits)
    blocks = BlockRange(shard, placement=placement)
    for text, ids_ST in TEXTS.items():
        pass_text(blocks, text, ids_ST)
    prune_all(blocks, "trial", TRIALS["subblock"])
    for text, ids_ST in TEXTS.items():
        pieces = batches(*ids_ST.shape, blocks.device)
        assert len(pieces) > 1
        alone = [blocks.forward("trial", text, rows, None) for rows in pieces]
        hidden_STH, errors = blocks.forward("trial", text, slice(0, len(ids_ST)), None)
        assert hidden_STH is not None
        assert torch.equal(hidden_STH, torch.cat([hidden for hidden, _ in alone if hidden is not None]))
        assert errors == {index: [e for _, each in alone for e in each[index]] for index in errors}
        outputs = [blocks.dense_output(text, rows) for rows in pieces]
        assert torch.equal(blocks.dense_output(text, slice(0, len(ids_ST))), torch.cat(outputs))


def test_batches_go_on_in_the_dense_model_where_they_were(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(at_once, "CPU_BATCH_TOKENS", 2 * IDS.shape[1])
    make_model("llama").save_pretrained(tmp_path)
    placement = Placement(weights="files", trials="disk", every=100, halves=False)
    shard = ModelShard.load(ModelSource(str(tmp_path)), dtype="float32", waits=True)
    blocks = BlockRange(shard, placement=placement)
    pass_text(blocks, CALIBRATION, IDS)
    prune_all(blocks, "trial", TRIALS["subblock"])
    kept, passed = blocks.texts[CALIBRATION].activations, list[int]()
    through = type(kept).through
    monkeypatch.setattr(
        type(kept),
        "through",
        lambda self, block, hidden: passed.append(block.index) or through(self, block, hidden),
    )
    kept._made.clear()
    blocks.forward("trial", CALIBRATION, slice(0, len(IDS)), None)
    pieces = len(batches(*IDS.shape, blocks.device))
    assert passed == [index for index in blocks.blocks for _ in range(pieces)]
    assert not kept._in_hand  # nothing goes on behind the last block


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value[key] for key in sorted(value)] if isinstance(value, dict) else list(value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", TRIALS)
def test_where_things_wait_changes_no_number_beside_a_gpu(kind: str, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    expected = all_of(tmp_path / "model", TRIALS[kind], Placement(activations="device"), "cuda:0")
    for name, placement in PLACEMENTS.items():
        found = all_of(tmp_path / "model", TRIALS[kind], placement, "cuda:0")
        for full, tensor in expected["weights"].items():
            assert torch.equal(found["weights"][full], tensor), (name, full)
        assert found["errors"] == expected["errors"], name


def test_only_the_blocks_in_hand_have_numbers(tmp_path: Path) -> None:
    """While a unit is recovered, and when nothing is done."""
    make_model("llama").save_pretrained(tmp_path / "model")
    placement = Placement(weights="files", trials="disk", activations="disk", scratch=tmp_path)
    shard = ModelShard.load(ModelSource(str(tmp_path / "model")), waits=True)
    blocks = BlockRange(shard, placement=placement)
    pass_text(blocks, CALIBRATION, IDS)
    trial = reconstruct_trial(granularity="block")
    prune_all(blocks, "trial", trial)

    def there() -> list[int]:
        return [
            index
            for index, block in blocks.blocks.items()
            if not any(parameter.isnan().any() for parameter in block.module.parameters())
        ]

    with blocks.in_hand("trial", [blocks.blocks[1]]):
        assert there() == [1]
    assert there() == []
    recover_unit(blocks, "trial", trial, "1")
    assert there() == []
    last = max(blocks.blocks)
    with blocks.using("trial", blocks.blocks[last]):
        assert there() == [last]
        resident = {name for name, tensor in blocks.weights["trial"].items() if not _is_mapped(tensor)}
    assert all(name.startswith(f"{blocks.blocks[last].prefix}.") for name in resident)


def _is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in a file of the scratch folder."""
    with open("/proc/self/maps", encoding="utf-8") as lines:
        for line in lines:
            start, stop = (int(word, 16) for word in line.split()[0].split("-"))
            if start <= tensor.data_ptr() < stop:
                return "(deleted)" in line
    return False


def test_blocks_are_read_a_few_times_and_not_for_every_unit(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    shard = ModelShard.load(ModelSource(str(tmp_path / "model")), waits=True)
    blocks, trial = BlockRange(shard, placement=Placement(weights="files")), TRIALS["matrix"]
    outside, passes = shard.bytes_read, 0
    for step in (
        lambda: pass_text(blocks, CALIBRATION, IDS),
        lambda: prune_all(blocks, "trial", trial),
        lambda: [recover_unit(blocks, "trial", trial, unit) for unit in unit_names(blocks, "matrix")],
    ):
        step()
        passes += 1
    once = sum(p.nbytes for block in blocks.blocks.values() for p in block.module.parameters())
    ahead = (
        2 * once / len(blocks.blocks)
    )  # the first block again after the last, and one that was not waited for
    assert shard.bytes_read - outside <= passes * (once + ahead)


def test_another_calibration_set_finds_nothing_of_the_one_before(tmp_path: Path) -> None:
    """Also where a trial was never released, and under its name."""
    make_model("llama").save_pretrained(tmp_path / "model")
    placement = Placement(
        weights="files", trials="disk", activations="disk", statistics="disk", scratch=tmp_path
    )
    blocks = BlockRange(
        ModelShard.load(ModelSource(str(tmp_path / "model")), waits=True), placement=placement
    )
    found = []
    for _ in range(2):
        pass_text(blocks, CALIBRATION, IDS)
        prune_all(blocks, "trial", TRIALS["subblock"])
        units = [
            recover_unit(blocks, "trial", TRIALS["subblock"], unit) for unit in unit_names(blocks, "subblock")
        ]
        found.append([asdict(unit) for unit in units if unit is not None])
        blocks.forget_texts()
        hand = blocks._hand
        assert hand is not None
        assert [len(left) for left in (hand._put, hand._nonzeros, blocks.weights)] == [0, 0, 0]
        assert not any(held.copies for held in hand._held.values())
    assert found[0] == found[1]


def test_tensors_on_disk_hold_no_files_open(tmp_path: Path) -> None:
    store, before = Store("disk", torch.device("cpu"), tmp_path), len(os.listdir("/proc/self/fd"))
    tensors = [store.put(torch.full((3, 4), float(number))) for number in range(50)]
    assert len(os.listdir("/proc/self/fd")) <= before
    assert [float(tensor.sum()) for tensor in tensors] == [12.0 * number for number in range(50)]
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_says_so(small_disk: Path) -> None:
    with pytest.raises(StorageError, match="execution.scratch"):
        Store("disk", torch.device("cpu"), small_disk).empty((64 << 20,), torch.float32)


@pytest.mark.parametrize("count", [2, 3])
def test_of_two_blocks_none_is_ever_put_away(count: int, tmp_path: Path) -> None:
    """As plans count: each is the next one of the other."""
    make_model("llama", num_hidden_layers=count).save_pretrained(tmp_path / "model")
    placement = Placement(weights="files", trials="disk", scratch=tmp_path)
    shard = ModelShard.load(ModelSource(str(tmp_path / "model")), dtype="float32", waits=True)
    blocks = BlockRange(shard, placement=placement)
    for text, ids_ST in TEXTS.items():
        pass_text(blocks, text, ids_ST)
    prune_all(blocks, "trial", TRIALS["subblock"])
    for unit in unit_names(blocks, "subblock"):
        recover_unit(blocks, "trial", TRIALS["subblock"], unit)
    blocks.forward("trial", CALIBRATION, slice(0, len(IDS)), None)
    assert any(map(_is_mapped, blocks.weights["trial"].values())) == (count == 3)
