"""Every family: a sweep's exports reload in plain transformers with their rows' perplexities, and so do their masks."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysweep.launching.exporting import export
from raysweep.launching.launch import launch
from raysweep.sweep.prepare import prepare
from tests.conftest import TINY_VOCABULARY
from tests.exported import check_zeros, plain_perplexity
from tests.families import FAMILIES, make_model

SHORT = ("llama", "gpt2", "gpt_neox")  # each takes seconds; what these do differently covers the rest
MASKS = ("wanda", "sparsegpt")
RECOVERY = {"recovery": "reconstruct", "granularity": "block", "learning_rate": 0.003}


@pytest.fixture
def folder(family, tmp_path, tiny_tokenizer) -> Path:
    place = tmp_path / family
    make_model(family, vocab_size=TINY_VOCABULARY).save_pretrained(place)
    tiny_tokenizer.save_pretrained(place)
    return place


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family in SHORT else pytest.mark.long) for family in FAMILIES],
)
def test_exports_reload_and_their_masks_give_the_same_rows(make_space, tmp_path, folder, family):
    model = {"path": str(folder), "dtype": "float32"}
    pruned = {"recovery": "none", "criterion": list(MASKS), "sparsity": 0.5}
    sweep = [pruned, RECOVERY | {"criterion": "wanda", "sparsity": 0.5}]
    space = make_space(model=model, sweep=sweep, execution={"keep": "all", "shards": 2})
    rows = launch(space, storage=tmp_path, in_process=True)
    assert (rows.status == "finished").all(), rows.error.dropna().tolist()
    ids = prepare(space, "cpu")[0].evaluation["test"].input_ids
    for row in rows[rows.recovery != "dense"].to_dict("records"):
        place = tmp_path / f"{row['recovery']}-{row['criterion']}"
        done = export(row["trial_id"], place, storage=tmp_path)
        assert (done.recomputed, done.measured) == (None, None)
        assert plain_perplexity(place, ids) == pytest.approx(row["perplexity"], rel=1e-6)
        check_zeros(place)
    files = [f"file:{tmp_path}/none-{mask}/masks.safetensors" for mask in MASKS]
    sweep = [{"recovery": "none", "criterion": files}, RECOVERY | {"criterion": files[0]}]
    again = launch(make_space(name="again", model=model, sweep=sweep), storage=tmp_path, in_process=True)
    for recovery, mask in (("none", "wanda"), ("none", "sparsegpt"), ("reconstruct", "wanda")):
        mine = rows[(rows.recovery == recovery) & (rows.criterion == mask)].perplexity.item()
        file = files[MASKS.index(mask)]
        assert again[(again.recovery == recovery) & (again.criterion == file)].perplexity.item() == mine
