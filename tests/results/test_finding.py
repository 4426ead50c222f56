"""A trial is found by its id, the beginning of it, or with its sweep's name; what is not is said with what is near."""

from __future__ import annotations

import pytest

from raysweep.errors import UsageError
from raysweep.results.cleaning import clean
from raysweep.results.finding import find_trial
from tests.analysis.rows import row, write_sweep

IDS = ("a1" + 14 * "0", "a2" + 14 * "0", "b1" + 14 * "0")


@pytest.fixture
def storage(tmp_path):
    """Sweep a has the first trial and the second, b the second and the third."""
    first, second, other = (row(number, trial_id=identity) for number, identity in enumerate(IDS))
    write_sweep(tmp_path / "a", [first, second])
    write_sweep(tmp_path / "b", [second, other])
    return tmp_path


def test_by_id_by_its_beginning_and_by_sweep(storage):
    first, second, _ = IDS
    for text in (first, "a1", first.upper(), f"a:{first}", "a:a1"):
        place, found = find_trial(text, storage)
        assert (place, found["trial_id"]) == (storage / "a", first)
    place, found = find_trial("b:a", storage)
    assert (place, found["trial_id"]) == (storage / "b", second)
    assert find_trial(f"{storage}/b:{second}", None)[1] == found


def test_after_clean(storage):
    clean(storage / "a")
    assert find_trial("a1", storage)[1]["trial_id"] == IDS[0]


def test_one_that_lies_in_two_sweeps(storage):
    with pytest.raises(UsageError, match="lies in 2 sweeps") as refused:
        find_trial("a2", storage)
    assert refused.value.allowed == f"a:{IDS[1]}, b:{IDS[1]}"


def test_a_beginning_of_several(storage):
    with pytest.raises(UsageError, match="2 trials begin with 'a'") as refused:
        find_trial("a", storage)
    assert refused.value.allowed == f"more digits: {IDS[0]}, {IDS[1]}"


@pytest.mark.parametrize("text", ["nothing", "a:zz", "a:", "a:b", "12345678901234567", "-", ""])
def test_what_is_no_trial(storage, text):
    with pytest.raises(UsageError, match="no trial"):
        find_trial(text, storage)


def test_the_nearest_id_is_named(storage):
    with pytest.raises(UsageError) as refused:
        find_trial("a1" + 13 * "0" + "7", storage)
    assert refused.value.nearest == IDS[0]


def test_an_unknown_sweep_and_an_empty_storage(storage, tmp_path):
    with pytest.raises(UsageError, match="no sweep 'c'"):
        find_trial("c:12", storage)
    with pytest.raises(UsageError, match="no trial"):
        find_trial("12", tmp_path / "empty")
