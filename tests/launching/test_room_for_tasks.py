"""Tasks need a whole model in one place: where that is, and what is refused."""

from __future__ import annotations

import pytest
import torch

from raysweep.cluster.nodes import Node
from raysweep.errors import CapacityError
from raysweep.launching import evaluation
from raysweep.launching.prepared import Launch
from raysweep.launching.task_job import Places, working_bytes
from raysweep.launching.tasks import places
from raysweep.model.checkpoint import ModelSource
from raysweep.model.shape_reading import read_shape
from raysweep.shards.memory import PROCESS_BYTES
from raysweep.sweep.prepare import prepare


@pytest.fixture
def measuring(tiny_llama, monkeypatch):
    """measuring(device, share, gpus): on devices that each have that share of what the model takes."""

    def make(device: str, share: float, gpus: int = 0):
        source = ModelSource(str(tiny_llama))
        shape = read_shape(source)
        free = int(share * working_bytes(shape, "float32"))
        monkeypatch.setattr(evaluation, "free_bytes", lambda _: free)
        monkeypatch.setattr(evaluation, "this_node", lambda: Node(2.0, gpus, 1 << 40, free))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return evaluation._Measuring(source, shape, "float32", torch.device(device), None, print)

    return make


def test_one_device_is_enough_where_it_is(measuring):
    assert not measuring("cpu", 1.0).spreads("auto")
    assert not measuring("cuda", 1.0, gpus=2).spreads("auto")


def test_several_gpus_hold_what_one_does_not(measuring):
    assert measuring("cuda", 0.6, gpus=2).spreads("auto")
    assert measuring("cuda", 0.6, gpus=2).spreads("cuda")


@pytest.mark.parametrize(
    ("device", "share", "gpus", "asked", "said"),
    [
        ("cpu", 0.9, 0, "auto", "cpu has"),
        ("cuda", 0.9, 1, "auto", "1 GPU has"),
        ("cuda", 0.4, 2, "auto", "2 GPUs have"),
        ("cuda:0", 0.6, 2, "cuda:0", "cuda:0 has"),  # that one and no other
    ],
)
def test_what_holds_no_whole_model_is_refused(measuring, device, share, gpus, asked, said):
    with pytest.raises(CapacityError, match=said) as refused:
        measuring(device, share, gpus).spreads(asked)
    assert "part by part" in str(refused.value.remedy)
    assert ("--device cpu" in str(refused.value.remedy)) == (asked == "auto" and device == "cuda")


def test_places_are_counted_by_memory_node_by_node(make_space):
    models = prepare(make_space(), "cpu")
    whole = working_bytes(models[0].shape, models[0].dtype)
    needed = whole + PROCESS_BYTES
    nodes = [Node(8.0, 0, 4 * needed + 1), Node(8.0, 0, needed + 1), Node(8.0, 0, needed - 1)]
    assert places(models, nodes) == Places(0, 5, needed)
    assert places(models, [Node(8.0, 4, needed, whole), Node(8.0, 0, needed)]) == Places(1, 4, whole)
    assert places(models, [Node(8.0, 5, needed, whole // 2 + 1)]) == Places(2, 2, whole)
    with pytest.raises(CapacityError, match="which no node has"):
        places(models, nodes[2:])


def test_tasks_on_all_trials_read_weights_that_shards_have_written(make_space, tmp_path):
    for where, reader in (("all", "tasks on all trials"), ("kept", None)):
        space = make_space(evaluation={"tasks": ["arc_easy"], "tasks_on": where})
        assert Launch(space, tmp_path, [], {}).reader_of_weights(retrains=False) == reader
        assert Launch(space, tmp_path, [], {}).reader_of_weights(retrains=True) == "retraining"
