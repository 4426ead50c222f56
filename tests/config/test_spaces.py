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


def test_every_space_that_ships_is_valid():
    for name in builtin_names():
        assert SearchSpace.from_yaml(builtin_space(name)).expand()


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
