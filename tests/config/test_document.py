"""YAML is read with the line of every key; what is no plain, small, honest YAML is refused."""

import pytest

from raysweep.config.dialect import dump_yaml
from raysweep.config.document import MAX_BYTES, Document, dotted
from raysweep.errors import UsageError


def parse(text):
    return Document.parse(text, "a.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        (".5", 0.5),
        ("-2.", -2.0),
        ("007", 7),
        ("2:4", "2:4"),
        ("yes", "yes"),
        ("on", "on"),
        ("True", True),
        ("~", None),
        ("", None),
        ("'1e-3'", "1e-3"),
        ("2026-01-01", "2026-01-01"),
        ("!!str 5", "5"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
    ],
)
def test_scalars_of_yaml_1_2(text, value):
    read = parse(f"key: {text}").data["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "value", ["1e-3", "2:4", "yes", "null", "1.5", "007", "", "~", "a: b", "# x", "é", "2026-01-01"]
)
def test_text_is_text_again_after_dumping(value):
    assert parse(dump_yaml({"key": [value]})).data == {"key": [value]}


@pytest.mark.parametrize("value", [1e-3, 1e-05, 1e22, 0.1, 5e-324, 3, True, None])
def test_scalars_are_themselves_after_dumping(value):
    read = parse(dump_yaml({"key": value})).data["key"]
    assert read == value
    assert type(read) is type(value)


def test_places_of_keys_and_items():
    document = parse("a:\n  b:\n    - 1\n    - c: 2\n")
    assert document.where(("a", "b")) == "a.yaml:2: a.b"
    assert document.where(("a", "b", 1, "c")) == "a.yaml:4: a.b[1].c"
    assert document.where(("a", "missing")) == "a.yaml:1: a.missing"
    assert dotted(("a", 0, "b")) == "a[0].b"


@pytest.mark.parametrize(
    ("text", "problem", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "given twice", 3),
        ("a: [1, 2\n", "no valid YAML", 2),
        ("a: 1\n\tb: 2\n", "no valid YAML", 2),
        ("a: !!python/object:os.system x\n", "tag", 1),
        ("a: !thing {}\n", "tag", 1),
        ("? [1, 2]\n: 3\n", "key", 1),
        ("a: *nowhere\n", "no valid YAML", 1),
        ("a: 1\n---\nb: 2\n", "no valid YAML", 2),
        ("a: " + "[" * 30 + "]" * 30, "too deeply", 1),
        ("a: " + "9" * 5000, "no number", 1),
        ("a: &x [*x]\n", "aliases", 1),
    ],
)
def test_refused_with_its_line(text, problem, line):
    with pytest.raises(UsageError, match=problem) as caught:
        parse(text)
    assert caught.value.where.startswith(f"a.yaml:{line}")


def test_nesting_of_any_depth_is_refused_quickly():
    with pytest.raises(UsageError, match="deeply|depth"):  # libyaml has a limit of its own
        parse("[" * (MAX_BYTES - 10))


def test_aliases_that_explode_are_refused():
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    with pytest.raises(UsageError, match="aliases"):
        parse("\n".join(lines))


def test_small_aliases_are_fine():
    assert parse("a: &a [1, 2]\nb: *a\n").data == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"a: \xff\xfe", "UTF-8"), (b"a: \x00", "no valid YAML"), (b"x" * (MAX_BYTES + 1), "bytes")],
)
def test_files_that_are_no_text(tmp_path, content, problem):
    path = tmp_path / "space.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=problem):
        Document.read(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UsageError, match="no search space at"):
        Document.read(tmp_path / "missing.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        Document.read(tmp_path)


def test_overrides_reach_into_lists_and_new_sections():
    document = parse("a: {b: 1}\nc:\n  - {d: 1}\n")
    document.override(["a.b=2", "c.0.d=[1e-3, 2]", "c[0].e=x: y", "new.deep.key=null"])
    document.override(["c.1={d: 5}", "a.t=a=b"])
    assert document.data == {
        "a": {"b": 2, "t": "a=b"},
        "c": [{"d": [0.001, 2], "e": {"x": "y"}}, {"d": 5}],
        "new": {"deep": {"key": None}},
    }
    assert document.where(("c", 0, "d", 1)) == "--set c.0.d: c[0].d[1]"
    assert document.where(("a", "b")) == "--set a.b"
    assert document.where(("new",)) == "--set new.deep.key"  # no line of the file


@pytest.mark.parametrize(
    ("assignment", "problem"),
    [
        ("a", "no setting"),
        ("=1", "no setting"),
        ("a..b=1", "no setting"),
        ("c.d=1", "list"),
        ("c.7.d=1", "list of 1"),
        ("a.b.x=1", "one value"),
        ("a.0=1", "no list"),
        ("a.b=[", "no valid YAML"),
    ],
)
def test_overrides_that_are_refused(assignment, problem):
    with pytest.raises(UsageError, match=problem) as caught:
        parse("a: {b: 1}\nc:\n  - {d: 1}\n").override([assignment])
    assert "--set" in str(caught.value)
