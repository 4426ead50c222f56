"""Work as it is counted, against what torch counts while a sweep really runs, and against rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from raysweep.cluster.nodes import Node
from raysweep.config.trial import Trial
from raysweep.launching.launch import launch, prepare_launch
from raysweep.launching.outlook import look_ahead
from raysweep.model.shape import BlockShape
from raysweep.reconstruction.flops import flop_counter
from raysweep.shards.costs import DENSE_PASS, Work, step_rate
from raysweep.sweep.planning import make_plans

NODE = Node(2, 0, 64 << 30)
STEPS = {
    "recovery": "reconstruct",
    "criterion": "wanda",
    "sparsity": 0.5,
    "learning_rate": 0.01,
    "epochs": 8,
    "batch_size": 2,
}
STREAMS = {"input_stream": "pruned", "statistics_stream": "recovered"}


def work_of(space, folder: Path) -> Work:
    prepared = prepare_launch(space, folder / space.name, "cpu")
    (plan,) = make_plans(prepared.models, space, [NODE])
    return look_ahead(prepared, prepared.models[0], plan, [NODE], "none").work


@pytest.mark.parametrize(
    "group",
    [
        {"recovery": "none", "criterion": ["magnitude", "wanda"], "sparsity": 0.5},
        STEPS | {"granularity": "matrix"},
        pytest.param(STEPS | {"granularity": "matrix", "loss": "normalized_mse"}, marks=pytest.mark.long),
        STEPS | {"granularity": "subblock", "learning_rate": [0.01, 0.02]},
        pytest.param(STEPS | {"granularity": "block"}, marks=pytest.mark.long),
        STEPS | {"granularity": "window:3"},
        STEPS | STREAMS | {"granularity": "block"},
        pytest.param(STEPS | STREAMS | {"granularity": "matrix"}, marks=pytest.mark.long),
        pytest.param(
            STEPS | STREAMS | {"granularity": "subblock", "target_stream": "pruned"}, marks=pytest.mark.long
        ),
        pytest.param(
            STEPS | {"granularity": "subblock", "statistics_stream": "pruned"}, marks=pytest.mark.long
        ),
    ],
    ids=lambda group: "-".join(str(group.get(name)) for name in ("granularity", "statistics_stream", "loss")),
)
def test_flops_are_those_that_torch_counts(group, make_space, tmp_path):
    space = make_space(sweep=[group], execution={"shards": 2, "keep": "none"})
    counted = work_of(space, tmp_path).flops
    with flop_counter() as counter:
        launch(space, in_process=True, storage=tmp_path)
    # besides what is counted units are profiled once, by passes of one batch
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize(
    ("group", "execution"),
    [
        (
            {"recovery": "none", "criterion": ["magnitude", "wanda"], "sparsity": 0.5},
            {"statistics_store": "anew"},
        ),
        pytest.param(
            STEPS | {"granularity": "subblock", "epochs": 1}, {"boundaries": 2}, marks=pytest.mark.long
        ),
        pytest.param(
            STEPS | {"granularity": "block", "epochs": 1},
            {"boundaries": 4, "statistics_store": "anew"},
            marks=pytest.mark.long,
        ),
        pytest.param(
            STEPS | {"granularity": "matrix", "epochs": 1},
            {"boundaries": 2, "statistics_store": "anew"},
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
def test_flops_of_what_is_made_again(group, execution, make_space, tiny_llama, tmp_path):
    """With more blocks than the few whose boundaries are held once they are made."""
    config = AutoConfig.from_pretrained(tiny_llama, num_hidden_layers=24)
    shutil.copytree(tiny_llama, tmp_path / "model")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    counted, measured = [], []
    for name, placed in {"kept": {}, "again": execution}.items():
        common = {"shards": 1, "keep": "none", "weight_store": "host"}  # either way block by block
        space = make_space(
            name=name, model={"path": str(tmp_path / "model")}, sweep=[group], execution=common | placed
        )
        counted.append(work_of(space, tmp_path).flops)
        with flop_counter() as counter:
            launch(space, in_process=True, storage=tmp_path)
        measured.append(counter.get_total_flops())
    more = measured[1] - measured[0]
    assert more > 0.05 * measured[0]
    assert counted[1] - counted[0] == pytest.approx(more, rel=0.12)  # the few that are still held at the end


@pytest.mark.parametrize("granularity", ["matrix", "subblock", "model"])
def test_training_is_what_rows_say(granularity, make_space, tmp_path):
    space = make_space(sweep=[STEPS | {"granularity": granularity}], execution={"shards": 2})
    steps = [piece for piece in work_of(space, tmp_path).pieces if piece.rate.startswith("step")]
    rows = launch(space, in_process=True, storage=tmp_path).set_index("recovery")
    assert sum(piece.flops for piece in steps) == rows.loc["reconstruct", "training_flops"]


def test_what_trials_share_is_counted_once(make_space, tmp_path):
    one = work_of(make_space(sweep=[STEPS | {"granularity": "block"}]), tmp_path)
    two = work_of(
        make_space(sweep=[STEPS | {"granularity": "block", "learning_rate": [0.01, 0.02]}]), tmp_path
    )
    added = {(piece.rate, piece.amount) for piece in two.pieces if piece.trial == 2}
    kept, measured = (6 + 3) * 32, 3 * 32 + 5 * 32 + 3 * 16
    assert {rate for rate, _ in added} == {
        step_rate(Trial.model_validate(STEPS | {"granularity": "block"})),
        f"open {step_rate(Trial.model_validate(STEPS | {'granularity': 'block'}))}",
        "forward",
        "losses",
    }
    assert ("losses", measured) in added
    assert ("forward", kept) in added  # errors after; those before are the first trial's
    assert two.flops_of(DENSE_PASS) == one.flops_of(DENSE_PASS)


def test_finished_trials_are_no_work(make_space, tmp_path):
    pruned = {"recovery": "none", "criterion": "wanda", "sparsity": 0.5}
    launch(make_space(sweep=[pruned]), in_process=True, storage=tmp_path)
    assert work_of(make_space(sweep=[pruned]), tmp_path).flops == 0
    added = work_of(make_space(sweep=[pruned, STEPS | {"granularity": "block", "epochs": 1}]), tmp_path)
    assert [piece.amount for piece in added.pieces if piece.rate == "losses"] == [(3 + 5) * 32 + 3 * 16]


def test_hidden_states_between_shards(make_space, tmp_path):
    group = {"recovery": "none", "criterion": "wanda", "sparsity": 0.5}
    assert work_of(make_space(sweep=[group], execution={"shards": 1}), tmp_path).network == 0
    calibration, validation, evaluation = 6 * 32, 3 * 32, 5 * 32 + 3 * 16
    passed = (calibration + validation) + evaluation + (calibration + validation + evaluation)
    back = 2 * (validation + evaluation) / 2  # both ends take turns with the head
    counted = work_of(make_space(sweep=[group], execution={"shards": 2}), tmp_path).network
    assert counted == (passed + back) * 32 * 4


def test_linears_that_share_their_input_are_told_by_their_names():
    names = (
        "attn.q_proj",
        "attn.k_proj",
        "attn.v_proj",
        "attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    block = BlockShape({f"0.{name}": (8, 8) for name in names}, 0)
    groups = [[name.rpartition(".")[2] for name in group] for group in block.input_groups]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
