"""docs/search-space.md says what the code says, and its example is a valid space."""

import re
from pathlib import Path

from raysweep.config.describe import main, markdown_table, search_space_reference
from raysweep.config.space import SearchSpace
from raysweep.config.trial import Trial

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "search-space.md"


def test_the_reference_is_up_to_date(tmp_path):
    target = tmp_path / "search-space.md"
    main([str(target)])
    assert target.read_text(encoding="utf-8") == REFERENCE.read_text(encoding="utf-8"), (
        "run `python -m raysweep.config.describe docs/search-space.md`"
    )


def test_its_example_is_a_valid_space():
    (example,) = re.findall(r"```yaml\n(.*?)```", search_space_reference(), re.DOTALL)
    assert len(SearchSpace.from_text(example).expand()) == 1 + 4 + 4


def test_every_field_of_a_trial_is_in_one_table():
    lines = search_space_reference().splitlines()
    groups = lines[lines.index("## Groups of `sweep`") :]
    groups = groups[: groups.index("## `search`")]
    for name in Trial.model_fields:
        assert sum(line.startswith(f"| `{name}` |") for line in groups) == 1


def test_bars_do_not_break_tables():
    assert markdown_table(("a",), [("x | y",)]) == "| a |\n| --- |\n| x \\| y |\n"
