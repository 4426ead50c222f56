"""Patterns of names: whole names, last parts, regular expressions."""

import pytest

from raysweep.config.names import check_name_pattern, matches
from raysweep.errors import UsageError

NAME = "model.layers.10.mlp.up_proj"


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        (NAME, True),
        ("up_proj", True),
        ("mlp.up_proj", True),
        ("10.mlp.up_proj", True),
        ("0.mlp.up_proj", False),
        ("proj", False),
        ("mlp", False),
        ("model.layers.1", False),
        (r"re:model\.layers\.1", True),
        (r"re:model\.layers\.1\.", False),
        ("re:.*up", True),
        ("re:up", False),
    ],
)
def test_what_a_pattern_means(pattern, meant):
    assert check_name_pattern(pattern) == pattern
    assert matches(pattern, NAME) == meant


def test_a_pattern_that_would_match_for_ever_is_refused():
    pattern = check_name_pattern(r"re:(?:.|..)+$(?<=!)")
    with pytest.raises(UsageError, match="too many ways"):
        matches(pattern, f"{NAME}.{NAME}")


@pytest.mark.parametrize("pattern", ["", "re:", "re:(", "re:*"])
def test_what_is_no_pattern(pattern):
    with pytest.raises(UsageError, match="no pattern of names"):
        check_name_pattern(pattern)
