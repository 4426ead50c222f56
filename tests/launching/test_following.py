"""A launch follows the nodes of its cluster: what it plans, waits for, and gives up."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from raysweep.cluster.nodes import Node
from raysweep.errors import ShardLostError
from raysweep.launching import model_run
from raysweep.launching.launch import prepare_launch
from raysweep.launching.model_run import ModelRun
from raysweep.sweep.planning import make_plans

NODE = Node(cpus=1, gpus=0, memory_bytes=8 << 30)
SMALL = replace(NODE, memory_bytes=1 << 20)
WITH_GPU = replace(NODE, gpus=1, gpu_bytes=80 << 30)


@pytest.fixture
def run(make_space, tmp_path, monkeypatch):
    """run(*clusters): a launch planned for two nodes, and then told of one cluster after another; and what it says."""
    monkeypatch.setattr(model_run, "LOOK_FOR_NODES_S", 0.0)
    space, nodes = make_space(execution={"shards": 2}), (NODE, NODE)
    prepared = prepare_launch(space, tmp_path / "tiny", "cpu")
    (plan,) = make_plans(prepared.models, space, nodes)

    def make(*clusters: tuple[Node, ...], strangers: tuple[str, ...] = ()) -> tuple[ModelRun, list[str]]:
        waiting, said, strange = list(clusters), list[str](), list(strangers)
        runner = SimpleNamespace(
            one_at_a_time=False,
            nodes=lambda: waiting.pop(0) if len(waiting) > 1 else waiting[0],
            strangers=lambda folder: [strange.pop()] if strange else [],
        )
        recorder = SimpleNamespace(progress=SimpleNamespace(stage=said.append))
        return ModelRun(prepared, prepared.models[0], plan, None, runner, recorder, nodes), said

    return make


def test_the_same_nodes_change_nothing(run):
    launched, said = run((NODE, NODE))
    plan = launched.plan
    launched._follow_nodes(retrained=False)
    assert launched.plan is plan
    assert said == []


def test_shards_share_the_node_that_is_left(run):
    launched, said = run((NODE,))
    launched._follow_nodes(retrained=False)
    assert launched.plan.shards == 2
    assert launched.plan.shares_cores
    assert said == []


def test_nodes_that_are_too_small_are_told_once_and_another_one_is_waited_for(run):
    launched, said = run((SMALL,), (SMALL,), (SMALL,), (SMALL, NODE))
    launched._follow_nodes(retrained=False)
    assert len(said) == 1
    assert said[0].startswith("Waiting for other nodes: the sweep needs")


def test_a_gpu_that_comes_changes_no_sweep_on_cpus(run):
    launched, said = run((NODE, WITH_GPU))
    launched._follow_nodes(retrained=False)
    assert launched.plan.device == "cpu"
    assert said == []


def test_nodes_that_do_not_share_the_storage_are_not_taken_in(run):
    launched, said = run((NODE, NODE, NODE), strangers=("c: another folder than here, or none",))
    launched._follow_nodes(retrained=False)
    assert said == [
        "Waiting for other nodes: these do not share the storage: c: another folder than here, or none"
    ]


def test_a_cluster_that_has_ended_is_not_waited_for(run):
    launched, _ = run(())
    with pytest.raises(ShardLostError, match="has ended"):
        launched._follow_nodes(retrained=False)
