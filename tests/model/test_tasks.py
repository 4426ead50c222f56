"""What tasks need is refused by name where it is missing, and what lm-eval returns becomes a column's value."""

from __future__ import annotations

import sys

import pytest

from raysweep.errors import RaysweepError, UsageError
from raysweep.model import tasks
from raysweep.model.tasks import TaskSet, find_tasks

FOUND = {
    "results": {
        "a": {
            "alias": "a",
            "sample_len": 5,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": 0.1,
            "acc,none": 0.25,
            "acc_stderr,none": "N/A",
        },
        "group": {"alias": "group", "sample_count": 7, "acc,none": 0.75, "acc_stderr,none": 0.2},
        "nothing": {"alias": "nothing", "sample_len": 1},
    },
    "configs": {"a": {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}, "nothing": {}},
}


@pytest.fixture(autouse=True)
def version(monkeypatch):
    monkeypatch.setattr(tasks.metadata, "version", lambda _: "0.4.13")


def test_the_first_metric_that_the_task_lists_is_the_value():
    score = tasks.score_of("a", FOUND)
    assert (score.metric, score.value, score.documents) == ("acc,none", 0.25, 5)
    assert score.values == {"acc_norm,none": 0.5, "acc,none": 0.25}
    assert score.errors == {"acc_norm,none": 0.1}  # what lm-eval cannot say is none
    assert score.told() == {"metric": "acc,none", "stderr": None, "documents": 5, "lm_eval": "0.4.13"}


def test_a_group_has_its_own_first_metric():
    score = tasks.score_of("group", FOUND)
    assert (score.metric, score.value, score.errors) == ("acc,none", 0.75, {"acc,none": 0.2})


def test_a_task_without_a_number_is_an_error():
    with pytest.raises(RaysweepError, match="no number for task 'nothing'"):
        tasks.score_of("nothing", FOUND)


def test_without_the_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match="tasks need lm-eval") as refused:
        find_tasks(["arc_easy"])
    assert "raysweep[tasks]" in str(refused.value.remedy)


def test_a_folder_of_tasks_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="no such folder of tasks: no/such"):
        find_tasks(["x"], "no/such")


def test_some_of_the_tasks_keep_their_order():
    known = TaskSet(("c", "a", "b"), None, {"a": "1", "b": "2", "c": "3"}, "/")
    assert known.only(["b", "c"]).names == ("c", "b")
    assert known.only([]).names == ()
