"""The study through sweeps: equal numbers for any number of shards, refusals that need the model, own criteria."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import raysweep
from raysweep.config.dialect import dump_yaml
from raysweep.config.space import SearchSpace
from raysweep.errors import UsageError
from raysweep.launching.launch import launch
from raysweep.model.checkpoint import ModelSource
from raysweep.model.shard import ModelShard
from raysweep.results.reader import load_results, load_units
from tests.frames import assert_same_numbers

STUDY: list[dict[str, Any]] = [
    {
        "recovery": "none",
        "criterion": ["random", "ria", "sparsegpt"],
        "sparsity": 0.5,
        "statistics_stream": ["dense", "pruned"],
    },
    {"recovery": "none", "criterion": ["wanda", "sparsegpt"], "pattern": "2:4"},
    {
        "recovery": "reconstruct",
        "criterion": "sparsegpt",
        "sparsity": 0.5,
        "granularity": ["block", "model"],
        "learning_rate": [0.01, 0.02],
    },
    {
        "recovery": "reconstruct",
        "criterion": "wanda",
        "sparsity": 0.5,
        "granularity": ["window:2", "window:3", "model"],
        "learning_rate": 0.01,
        "max_grad_norm": [None, 0.05],
    },
    {
        "recovery": "reconstruct",
        "criterion": "wanda",
        "sparsity": 0.5,
        "granularity": ["matrix", "subblock", "window:3"],
        "input_stream": "pruned",
        "target_stream": ["dense", "pruned"],
        "statistics_stream": ["pruned", "recovered"],
        "learning_rate": 0.01,
    },
    {
        "recovery": "reconstruct",
        "criterion": "sparsegpt",
        "sparsity": 0.5,
        "granularity": "matrix",
        "optimizer": "exact",
        "input_stream": ["dense", "pruned"],
    },
    {
        "recovery": "reconstruct",
        "criterion": "magnitude",
        "sparsity": {"mlp.down_proj": 0.3, "re:.*mlp": 0.6, "re:.*": 0.5},
        "granularity": ["block", "model"],
        "trainable": ["lora", "lora+norms"],
        "lora_rank": 2,
        "loss": ["normalized_mse", "cosine"],
        "optimizer": "sgd",
        "learning_rate": 0.05,
    },
    {
        "recovery": "reconstruct",
        "criterion": "wanda",
        "sparsity": 0.5,
        "targets": ["up_proj", "gate_proj", "q_proj"],
        "ignore": "re:model.layers.3",
        "granularity": ["matrix", "subblock"],
        "learning_rate": 0.01,
    },
]


@pytest.fixture(scope="module")
def study_folder(tiny_llama, tiny_text, tmp_path_factory) -> Any:
    """launch_with(shards): the folder of the study launched in process with so many shards."""
    made: dict[int, Path] = {}

    def launch_with(shards: int) -> Path:
        if shards not in made:
            storage = tmp_path_factory.mktemp(f"shards-{shards}")
            launch(study_space(tiny_llama, tiny_text, shards), storage=storage, in_process=True)
            made[shards] = storage / "study"
        return made[shards]

    return launch_with


def study_space(tiny_llama: Path, tiny_text: Path, shards: int, sweep: Any = None) -> raysweep.SearchSpace:
    return raysweep.SearchSpace.from_dict(
        {
            "name": "study",
            "model": {"path": str(tiny_llama), "dtype": "float32"},
            "calibration": {"dataset": str(tiny_text), "num_samples": 5, "sequence_length": 24},
            "validation": {"samples": 2},
            "evaluation": {
                "perplexity": [
                    {"name": "test", "dataset": str(tiny_text), "sequence_length": 24, "max_windows": 3}
                ]
            },
            "sweep": sweep or STUDY,
            "execution": {"shards": shards},
        }
    )


def test_every_trial_of_the_study_finishes(study_folder):
    rows = load_results(study_folder(1))
    assert (rows.status == "finished").all(), rows.error.dropna().tolist()
    assert (
        len(rows) == 1 + 5 + 2 + 4 + 6 + 12 + 2 + 8 + 2
    )  # random reads no statistics: one row for both streams
    assert rows.pruned_perplexity[rows.recovery != "dense"].notna().all()
    assert rows.output_error_validation.notna().all()
    recovered = rows[rows.recovery == "reconstruct"]
    assert recovered.unit_error_after.lt(recovered.unit_error_before).mean() > 0.9
    assert recovered.peak_recovery_bytes.gt(0).all()
    exact = rows[rows.optimizer == "exact"]
    assert exact[["learning_rate", "epochs", "optimizer_steps", "tokens_trained"]].isna().all().all()
    mapped = rows[rows.sparsity_by_name.notna()]
    assert mapped.sparsity.isna().all()
    assert json.loads(mapped.sparsity_by_name.iloc[0]) == {
        "mlp.down_proj": 0.3,
        "re:.*mlp": 0.6,
        "re:.*": 0.5,
    }
    assert mapped.realized_sparsity.between(0.4, 0.6).all()


@pytest.mark.parametrize("shards", [2, 3])
def test_the_number_of_shards_changes_no_number_of_the_study(study_folder, shards):
    assert_same_numbers(study_folder(1), study_folder(shards))


@pytest.fixture(scope="module")
def six_blocks(tiny_llama, tmp_path_factory) -> Path:
    """The tiny Llama with six blocks, of which the third and fourth lie in two of two shards."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("six_blocks")
    config = AutoConfig.from_pretrained(tiny_llama, num_hidden_layers=6)
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def test_a_window_over_two_shards_in_the_middle_hands_on_the_right_stream(six_blocks, tiny_text, tmp_path):
    group = {
        "recovery": "reconstruct",
        "criterion": "wanda",
        "sparsity": 0.5,
        "granularity": "window:2",
        "statistics_stream": "recovered",
        "input_stream": ["dense", "pruned"],
        "learning_rate": 0.01,
    }
    for shards in (1, 2):
        launch(
            study_space(six_blocks, tiny_text, shards, [group]),
            storage=tmp_path / str(shards),
            in_process=True,
        )
    assert_same_numbers(tmp_path / "1" / "study", tmp_path / "2" / "study")


def test_windows_over_shards_in_which_nothing_is_pruned_are_left_dense(six_blocks, tiny_text, tmp_path):
    group = {
        "recovery": "reconstruct",
        "criterion": "wanda",
        "sparsity": 0.5,
        "granularity": "window:2",
        "targets": ["re:.*layers.[0145]"],
        "input_stream": ["dense", "pruned"],
        "target_stream": "dense",
        "learning_rate": 0.01,
    }
    for shards in (1, 2):
        space = study_space(six_blocks, tiny_text, shards, [group])
        launch(space, storage=tmp_path / str(shards), in_process=True)
    assert_same_numbers(tmp_path / "1" / "study", tmp_path / "2" / "study")
    units = load_units(tmp_path / "2" / "study")
    assert set(units[units.kind == "unit"].unit) == {"0-1", "4-5"}


def test_units_of_the_study(study_folder):
    rows, units = load_results(study_folder(3)), load_units(study_folder(3))
    trial = rows[(rows.granularity == "window:3") & (rows.input_stream == "dense")].iloc[0]
    mine = units[(units.trial_id == trial.trial_id) & (units.kind == "unit")]
    assert list(mine.unit) == ["0-2", "3-3"]
    assert list(mine.linears.str.count(",") + 1) == [21, 7]
    sparsegpt = rows[(rows.criterion == "sparsegpt") & (rows.recovery == "none")].iloc[0]
    linears = units[(units.trial_id == sparsegpt.trial_id) & (units.kind == "linear")]
    assert (linears.dampening_used == 0.01).all()
    assert len(linears) == 28
    targeted = rows[rows.targets.notna()].iloc[0]
    linears = units[(units.trial_id == targeted.trial_id) & (units.kind == "linear")]
    assert set(linears.linears.str.rpartition(".")[2]) == {"up_proj", "gate_proj", "q_proj"}
    assert set(linears.block) == {0, 1, 2}


def test_masks_from_a_file_give_the_row_of_the_trial_that_they_come_from(
    study_folder, tiny_llama, tiny_text, tmp_path
):
    model = ModelShard.load(ModelSource(str(tiny_llama)), dtype="float32").model
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))
    pruned = raysweep.prune(model, ids, criterion="sparsegpt", sparsity=0.5)
    tensors = {name: mask.to(torch.uint8) for name, mask in pruned.masks.items()}
    save_file(tensors | pruned.weights, tmp_path / "masks.safetensors")
    group = {"recovery": "none", "criterion": f"file:{tmp_path}/masks.safetensors"}
    rows = launch(study_space(tiny_llama, tiny_text, 2, [group]), storage=tmp_path, in_process=True)
    assert list(rows.status) == ["finished"] * 2
    row = rows[rows.recovery == "none"].iloc[0]
    zeros = sum(int((mask == 0).sum()) for mask in tensors.values())
    assert row.realized_sparsity == pytest.approx(zeros / sum(mask.numel() for mask in tensors.values()))
    (tmp_path / "moved").mkdir()
    (tmp_path / "masks.safetensors").rename(tmp_path / "moved/same.safetensors")
    again = launch(
        study_space(
            tiny_llama, tiny_text, 2, [group | {"criterion": f"file:{tmp_path}/moved/same.safetensors"}]
        ),
        storage=tmp_path,
        in_process=True,
    )
    assert len(again) == 2  # known by its contents: nothing ran
    assert load_file(tmp_path / "moved/same.safetensors").keys() == tensors.keys() | pruned.weights.keys()


OWN = "import torch\n\ndef wanda(weight, statistics):\n    return weight.abs() * statistics.norm_I\n"


@pytest.fixture
def own_module(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_criteria.py").write_text(OWN)
    yield tmp_path / "own_criteria.py"
    sys.modules.pop("own_criteria", None)


def test_a_function_of_the_users_own_is_a_criterion_and_its_source_an_identity(
    tiny_llama, tiny_text, own_module
):
    groups = [{"recovery": "none", "criterion": ["wanda", "own_criteria:wanda"], "sparsity": 0.5}]
    space = study_space(tiny_llama, tiny_text, 2, groups)
    rows = launch(space, storage=own_module.parent, in_process=True).set_index("criterion")
    assert rows.perplexity["own_criteria:wanda"] == rows.perplexity["wanda"]
    assert rows.trial_id["own_criteria:wanda"] != rows.trial_id["wanda"]
    own_module.write_text(OWN.replace("weight.abs()", "-weight.abs()"))
    changed = launch(space, storage=own_module.parent, in_process=True)
    assert len(changed) == 4
    assert changed[changed.criterion == "own_criteria:wanda"].perplexity.nunique() == 2


def test_a_function_that_fails_or_returns_no_scores_makes_a_failed_row(tiny_llama, tiny_text, own_module):
    own_module.write_text(
        "def fails(weight, statistics):\n    raise KeyError('why')\n\ndef one(weight, statistics):\n    return 1.0\n"
    )
    groups = [{"recovery": "none", "criterion": ["own_criteria:fails", "own_criteria:one"], "sparsity": 0.5}]
    rows = launch(study_space(tiny_llama, tiny_text, 1, groups), storage=own_module.parent, in_process=True)
    errors = rows.set_index("criterion").error
    assert "KeyError" in errors["own_criteria:fails"]
    assert "returned a float, not scores of shape" in errors["own_criteria:one"]


RECONSTRUCT = {
    "recovery": "reconstruct",
    "criterion": "wanda",
    "sparsity": 0.5,
    "granularity": "block",
    "learning_rate": 0.01,
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"granularity": "window:5"}, "window:5 is longer than the model, which has 4 blocks"),
        ({"trainable": "lora", "lora_rank": 17}, "lora_rank 17 is above the smaller side"),
        ({"targets": ["up_prj"]}, "did you mean 'up_proj'"),
        ({"ignore": ["re:.*nothing"]}, "matches no linear"),
        ({"sparsity": {"mlp.up": 0.5}}, "'mlp.up' matches no linear"),
        ({"targets": ["up_proj"], "ignore": ["re:.*"]}, "no linear is left"),
        ({"criterion": "file:nowhere.safetensors", "sparsity": None}, "nowhere.safetensors"),
        ({"criterion": "no_such_module:score"}, "cannot be imported"),
        ({"criterion": "json:no_such_function"}, "has no function 'no_such_function'"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(
    tiny_llama, tiny_text, tmp_path, changes, said
):
    group = {name: value for name, value in (RECONSTRUCT | changes).items() if value is not None}
    with pytest.raises(UsageError, match=said):
        launch(study_space(tiny_llama, tiny_text, 1, [group]), storage=tmp_path, in_process=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("group", "place"),
    [
        ("granularity: [block, 'window:5']", "granularity"),
        ("granularity: block, lora_rank: {choice: [4, 99]}, trainable: lora", "lora_rank"),
    ],
)
@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_what_does_not_fit_the_model_is_refused_with_file_line_and_group(
    tiny_llama, tiny_text, tmp_path, group, place, algorithm
):
    first = {"recovery": "none", "criterion": "wanda", "sparsity": 0.5}
    whole = study_space(tiny_llama, tiny_text, 1, [first]).to_dict()
    whole["search"] |= {"algorithm": algorithm, "num_samples": 8}
    del whole["sweep"]
    text = dump_yaml(whole) + "\n".join(
        [
            "sweep:",
            "  - {recovery: none, criterion: wanda, sparsity: 0.5}",
            "  - {recovery: reconstruct, criterion: wanda, sparsity: 0.5, learning_rate: 0.01, "
            + group
            + "}",
        ]
    )
    space = SearchSpace.from_text(text, source="mine.yaml")
    with pytest.raises(UsageError) as caught:
        launch(space, storage=tmp_path, in_process=True)
    assert caught.value.where == f"mine.yaml:{len(text.splitlines())}: sweep[1].{place}"


def test_what_retraining_starts_from_is_checked_too(tiny_llama, tiny_text, tmp_path):
    start = {"granularity": "window:5", "learning_rate": 0.01}
    group = {"recovery": "retrain", "criterion": "wanda", "sparsity": 0.5, "learning_rate": 0.01}
    space = study_space(tiny_llama, tiny_text, 1, [group | {"start_from": start}])
    with pytest.raises(
        UsageError, match=r"sweep\[0\]\.start_from\.granularity: granularity window:5 is longer"
    ):
        launch(space, storage=tmp_path, in_process=True)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"model.layers.0.mlp.up": torch.ones(2, 2)}, "no linear of the model"),
        ({"model.layers.0.mlp.up_proj": torch.ones(3, 3)}, "has shape"),
        ({"model.layers.0.mlp.up_proj": torch.full((48, 32), 2)}, "other numbers than 0 and 1"),
        ({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}, "holds no mask"),
        (
            {
                "model.layers.0.mlp.up_proj": torch.ones(48, 32),
                "model.layers.1.mlp.up_proj.weight": torch.ones(48, 32),
            },
            "a weight without its mask",
        ),
    ],
)
def test_a_file_of_masks_that_does_not_fit_is_refused(tiny_llama, tiny_text, tmp_path, tensors, said):
    save_file({name: tensor.to(torch.uint8) for name, tensor in tensors.items()}, tmp_path / "m.safetensors")
    group = {"recovery": "none", "criterion": f"file:{tmp_path}/m.safetensors"}
    with pytest.raises(UsageError, match=said):
        launch(study_space(tiny_llama, tiny_text, 1, [group]), storage=tmp_path / "s", in_process=True)
    assert not (tmp_path / "s").exists()
