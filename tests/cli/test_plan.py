"""`raysweep plan` counts what would run and adds up memory as the memory model does; it writes nothing."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from raysweep.baseline.plan import RetrainPlan
from raysweep.cli.plan import (
    IN_HAND_PARTS,
    ON_DISK_PARTS,
    STORED_PARTS,
    WAITING_PARTS,
    _memory_table,
    _print_facts,
)
from raysweep.cluster.nodes import Node
from raysweep.config.space import SearchSpace
from raysweep.launching.launch import launch
from raysweep.model.shape import BlockShape, ModelShape
from raysweep.reconstruction.placement import Placement
from raysweep.shards.memory import Workload, shard_memory
from raysweep.shards.plan import make_plan


@pytest.fixture(autouse=True)
def starts_at_once(monkeypatch):
    """A process that imports torch takes seconds, which every plan of a new device would."""
    monkeypatch.setattr("raysweep.shards.probe._import_seconds", lambda: 2.0)


def test_the_plan_of_a_new_sweep(raysweep, space_file, here):
    settings = ("--set", "execution.shards=2", "--set", "execution.keep=none")
    document = raysweep("plan", space_file, *settings, "--json").json
    assert document["trials"] == {
        "planned": 4,
        "finished": 0,
        "failed": 0,
        "new": 4,
        "again": 0,
        "to_run": 4,
    }
    (model,) = document["models"]
    assert model["blocks"] == 4
    assert [shard["blocks"] for shard in model["shards"]] == [[0, 2], [2, 4]]
    assert {(kind["recovery"], kind["granularity"]): kind["planned"] for kind in model["trials"]} == {
        ("dense", None): 1,
        ("none", None): 2,
        ("reconstruct", "subblock"): 1,
    }
    for shard in model["shards"]:
        memory = shard["memory"]
        assert memory["total"] == memory["device"] + memory["host"]
    assert model["host_bytes"] == sum(shard["memory"]["total"] for shard in model["shards"])
    assert model["storage_bytes"] == model["concurrent_trials"] * model["parameters"] * 4
    assert model["kept_bytes"] == 0
    assert list(here.iterdir()) == []


def test_work_and_time_add_up(raysweep, space_file):
    document = raysweep("plan", space_file, "--set", "execution.shards=2", "--json").json
    (model,) = document["models"]
    kinds = [*model["trials"], model["dense_pass"]]
    assert sum(kind["flops"] for kind in kinds) == pytest.approx(model["flops"])
    seconds = model["seconds"]
    assert sum(kind["seconds"] for kind in kinds) == pytest.approx(seconds["dense_pass"] + seconds["trials"])
    assert seconds["total"] == pytest.approx(
        sum(seconds[part] for part in ("start", "dense_pass", "trials", "retraining"))
    )
    assert (document["seconds"], document["flops"]) == (seconds["total"], model["flops"])
    assert document["network_bytes"] == model["network_bytes"] > 0
    peak = max(shard["memory"]["total"] for shard in model["shards"])
    assert 0 < max(kind["peak_bytes"] for kind in model["trials"]) <= peak
    instead = model["retraining_instead"]
    assert (instead["zero_stage"], instead["workers"], instead["tokens"]) == (2, 1, 4 * 32)
    assert instead["flops"] == pytest.approx(6 * (model["parameters"]) * 4 * 32)
    assert instead["bytes"] > model["parameters"] * 16
    assert instead["recovery_bytes"] < instead["bytes"]


def test_times_only_where_the_device_was_measured(raysweep, space_file, monkeypatch):
    from raysweep.shards import probe

    text = raysweep("plan", space_file).out
    assert "time " in text
    assert "retraining instead" in text
    monkeypatch.setattr(probe, "measure", None)  # it is known by now
    assert raysweep("plan", space_file).out == text
    without = raysweep("plan", space_file, "--no-probe").out
    assert "about" not in without
    assert "FLOP" in without
    assert raysweep("plan", space_file, "--no-probe", "--json").json["seconds"] is None
    both = raysweep("plan", space_file, "--no-probe", "--probe-again")
    assert both.status == 2
    assert "exclude each other" in both.err


def test_kept_trials_are_counted(raysweep, space_file):
    """Two pruned trials and one recovered are in two cells; while it runs, one in flight may lie there as well."""

    def planned(keep: str) -> tuple[int, int]:
        settings = ("--set", f"execution.keep={keep}", "--set", "execution.concurrent_trials=1", "--json")
        (model,) = raysweep("plan", space_file, *settings).json["models"]
        return model["kept_bytes"], model["storage_bytes"]

    (none, without), (best, _), (every, whole) = planned("none"), planned("best"), planned("all")
    linears = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)  # blocks of q, o, k, v and the MLP
    one = linears + 4 * (linears + 4 * 2 * 32)  # masks in bytes; weights with two norms in float32
    assert (none, best, every) == (0, 2 * one, 3 * one)
    assert whole == without + every
    text = raysweep("plan", space_file).out
    assert "stays, of kept trials" in text


def test_what_a_study_chooses_is_named(raysweep, space_file):
    """Five trials in a cell of its own, beside what is listed."""
    changes = [
        "search={algorithm: optuna, num_samples: 5, compare_within: [recovery, criterion]}",
        "sweep.1.learning_rate={loguniform: [0.001, 0.1]}",
        "sweep.1.granularity=[block, subblock]",
    ]
    settings = [part for change in changes for part in ("--set", change)]
    (model,) = raysweep("plan", space_file, *settings, "--json").json["models"]
    (study,) = model["studies"]
    assert study["chooses"] == {
        "granularity": ["block", "subblock"],
        "learning_rate": {"loguniform": [0.001, 0.1]},
    }
    assert (study["trials"], study["to_run"], study["fixed"]["criterion"]) == (5, 5, "wanda")
    (chosen_kind,) = [kind for kind in model["trials"] if kind["granularity"] == "chosen"]
    assert (chosen_kind["recovery"], chosen_kind["planned"], chosen_kind["to_run"]) == ("reconstruct", 5, 5)
    assert chosen_kind["flops"] > 0
    text = raysweep("plan", space_file, *settings).out
    chosen = "granularity (block, subblock), learning_rate (loguniform 0.001 to 0.1)"
    assert f"Optuna chooses {chosen} in 1 cell of 5 trials each" in text


def test_parameters_are_those_of_the_model(raysweep, space_file, tiny_llama):
    from transformers import AutoModelForCausalLM

    counted = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_llama).parameters())
    (model,) = raysweep("plan", space_file, "--json").json["models"]
    # Final norm and separate head are in no block; the plan counts blocks and one embedding.
    assert counted - model["parameters"] == 32 + 128 * 32


def test_finished_and_failed_trials_are_counted(raysweep, space_file, here):
    space = SearchSpace.from_yaml(space_file, ["sweep.1.learning_rate=1e30"])
    launch(space, in_process=True, storage=here / "raysweep-results")
    changed = ["--set", "sweep.1.learning_rate=[1e30, 0.01]"]
    document = raysweep("plan", space_file, *changed, "--json").json
    counts = {"planned": 5, "finished": 3, "failed": 1, "new": 1, "again": 0, "to_run": 1}
    assert document["trials"] == counts
    text = raysweep("plan", space_file, *changed).out
    assert "small: 5 trials (1 new, 3 finished, 1 failed, to stay so)" in text


def test_the_text_names_shards_blocks_and_totals(raysweep, space_file):
    document = raysweep("plan", space_file, "--set", "execution.shards=3", "--json").json
    text = raysweep("plan", space_file, "--set", "execution.shards=3").out
    assert "blocks by shard  0: 0-1; 1: 2; 2: 3" in text
    totals = re.search(r"total +([\d,]+) +([\d,]+) +([\d,]+)", text)
    shards = document["models"][0]["shards"]
    assert totals is not None
    assert [int(number.replace(",", "")) for number in totals.groups()] == [
        round(shard["memory"]["total"] / 2**20) for shard in shards
    ]
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 80  # paths are never cut


def test_alike_shards_share_a_column(raysweep, space_file):
    text = raysweep("plan", space_file, "--set", "execution.shards=4").out
    assert "each of 1-2" in text


def test_another_name_and_storage(raysweep, space_file, here):
    document = raysweep("plan", space_file, "--name", "other", "--storage", here / "there", "--json").json
    assert (document["sweep"], document["folder"]) == ("other", str(here / "there" / "other"))


def test_on_gpus_device_and_host_are_summed_apart():
    node = Node(cpus=32, gpus=2, memory_bytes=256 << 30, gpu_bytes=80 << 30)
    block = BlockShape({"0.q": (4096, 4096), "0.down": (4096, 14336)}, 80 << 20)
    model = ModelShape((block,) * 8, 4096, 32000, 32000 * 4096, 8192, "float32", "bfloat16")
    work = Workload(
        ((128, 2048),), 2048, 2, masks=3, granularities=frozenset({"subblock"}), concurrent_trials=1
    )
    plan = make_plan(model, [node], work, "bfloat16")
    console = Console(file=io.StringIO(), width=80, record=True)
    _print_facts(console, plan, node, RetrainPlan(2, True, 1.0, 40 << 30), 5 << 30)
    console.print(_memory_table(plan))
    text = console.export_text()
    for title, name in (("on the GPU", "device"), ("on the host", "host")):
        shown = re.search(rf"{title} +([\d,]+) +([\d,]+)", text)
        assert shown is not None
        expected = [round(getattr(memory, name) / 2**20) for memory in plan.memory]
        assert [int(number.replace(",", "")) for number in shown.groups()] == expected
    assert "memory of one GPU" in text
    assert "of 80.0 GiB" in text
    assert "2 of 2 GPUs" in text
    assert "2 workers after the shards, up to 40.0 GiB on each GPU" in text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("store", ["device", "host", "disk"])
def test_the_rows_of_memory_add_up(store, device):
    linears = {"b.q": (64, 64), "b.up": (256, 64)}
    blocks = tuple(BlockShape({f"{k}.{n}": s for n, s in linears.items()}, 20480) for k in range(4))
    model = ModelShape(blocks, 64, 500, 32000, 512, "float32", "bfloat16")
    work = Workload(
        texts=((8, 32),),
        evaluation_tokens=32,
        batch_size=1,
        masks=2,
        granularities=frozenset({"matrix", "block"}),
        concurrent_trials=2,
        updated=1,
        factors=2,
        inputs=True,
        streams=True,
        trained_tokens=1 << 20,
    )
    placement = Placement(weights="host", activations=store, statistics="host", trials="host")
    memory = shard_memory(model, 0, 4, "float32", work, placement=placement, device=device)
    parts = [*IN_HAND_PARTS, *WAITING_PARTS, "process", *(STORED_PARTS if store != "disk" else [])]
    assert sum(getattr(memory, part) for part in parts) == memory.total
    on_disk = [*ON_DISK_PARTS, *(STORED_PARTS if store == "disk" else [])]
    assert sum(getattr(memory, part) for part in on_disk) == memory.disk
