"""Search spaces that ship with raysweep are found by name, others by path."""

import pytest

from raysweep.config.space import SearchSpace
from raysweep.config.spaces import builtin_names, builtin_space, resolve_space
from raysweep.errors import UsageError


def test_the_quickstart_has_two_pruned_and_six_reconstructed_trials():
    trials = [planned.trial for planned in SearchSpace.from_yaml(builtin_space("quickstart")).expand()]
    assert [trial.recovery for trial in trials] == ["dense"] + ["none"] * 2 + ["reconstruct"] * 6
    assert {trial.criterion for trial in trials[1:]} == {"magnitude", "wanda"}
    assert {trial.granularity for trial in trials[3:]} == {"matrix", "subblock", "block"}


CRITERIA = {"magnitude", "wanda", "ria", "sparsegpt"}
SPACES = {  # trials, with the dense one, and the values of the axes that a space is about
    "quickstart": (9, {"granularity": {"matrix", "subblock", "block"}}),
    "criteria": (
        1 + 5 * 4 + 4 + 5 * 4,
        {"criterion": CRITERIA | {"random"}, "sparsity": {0.3, 0.5, 0.6, 0.7}},
    ),
    "nm": (
        1 + 4 * (3 + 2) + 4 * 2 * (3 + 2),
        {"pattern": {"unstructured", "2:4", "4:8", "1:4"}, "sparsity": {0.5, 0.75}, "criterion": CRITERIA},
    ),
    "streams": (
        1 + 2 * 2 + 2 * 3 * 2 * 2 + 2 * 3 * 2,
        {
            "statistics_stream": {"dense", "pruned", "recovered"},
            "input_stream": {"dense", "pruned"},
            "target_stream": {"dense", "pruned"},
        },
    ),
    "learning_rates": (
        1 + 6 * 8,
        {"granularity": {"matrix", "subblock", "block", "window:2", "window:4", "model"}},
    ),
    "retraining": (
        1 + 1 + 3 + 4,
        {
            "recovery": {"dense", "none", "reconstruct", "retrain"},
            "loss": {"mse", "next_token", "distillation"},
            "trainable": {"all", "lora"},
        },
    ),
    "paper": (
        1 + 3 * (4 * (3 + 1) + 4 * (3 + 1) * 6 + 4 * 3),
        {
            "criterion": CRITERIA,
            "sparsity": {0.5, 0.6, 0.7},
            "pattern": {"unstructured", "2:4"},
            "granularity": {"matrix", "subblock", "block", "window:2", "window:4", "model"},
            "optimizer": {"adamw", "exact"},
        },
    ),
}


def test_the_spaces_that_ship_are_these():
    assert set(builtin_names()) == set(SPACES)


@pytest.mark.parametrize("name", SPACES)
def test_spaces_expand_to_what_they_promise(name):
    trials, axes = SPACES[name]
    space = SearchSpace.from_yaml(builtin_space(name))
    planned = space.expand()
    assert (space.name, len(planned)) == (name, trials)
    for field, values in axes.items():
        assert {getattr(one.trial, field) for one in planned} - {None} == values
    assert SearchSpace.from_dict(space.to_dict()).expand() == planned


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_space("quickstart") == builtin_space("quickstart")
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: a\n")
    assert resolve_space(str(mine)) == mine
    (tmp_path / "quickstart").mkdir()
    assert resolve_space("quickstart") == builtin_space("quickstart")


@pytest.mark.parametrize("text", ["quickstrat", "searchspaces/quickstart.yml", "../quickstart"])
def test_what_is_not_there_is_refused_with_the_nearest_name(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        resolve_space(text)
    assert caught.value.nearest == "quickstart"
    assert "quickstart" in caught.value.allowed


@pytest.mark.parametrize("name", ["nothing", "../quickstart", "", "/etc/passwd"])
def test_unknown_builtin_names_are_refused(name):
    with pytest.raises(UsageError, match="quickstart"):
        builtin_space(name)
