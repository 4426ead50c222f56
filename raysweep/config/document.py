"""Reads a YAML file into plain data and remembers the line of every key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raysweep.config.dialect import TAG, Loader
from raysweep.errors import UsageError

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_VALUES = 100_000  # aliases are followed, so this also stops files that explode


def dotted(path: KeyPath) -> str:
    """sweep[0].learning_rate"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


@dataclass
class Document:
    """Plain data with the place of every key. `source` is a file name, or None for data made in Python."""

    data: Any
    source: str | None = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Document:
        """Raises UsageError when the file cannot be read, is too large or is no YAML."""
        try:
            if path.is_dir():
                raise UsageError(f"{path} is a folder", allowed="a YAML file")
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise UsageError(
                    f"{path} has {size} bytes", allowed=f"a search space of at most {MAX_BYTES} bytes"
                )
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise UsageError(f"no search space at {path}", allowed="the path of a YAML file") from None
        except UnicodeDecodeError:
            raise UsageError(f"{path} is not text in UTF-8", allowed="a YAML file in UTF-8") from None
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str) -> Document:
        if len(text.encode("utf-8", "replace")) > MAX_BYTES:
            raise UsageError(f"{source} is too long", allowed=f"at most {MAX_BYTES} bytes")
        document = cls(None, source)
        node = _compose(text, source)
        document.data = None if node is None else _Builder(document).build(node, ())
        return document

    def where(self, path: KeyPath) -> str | None:
        """file:line: key, or the override that set it, or the key alone."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.overrides:
                flag = f"--set {self.overrides[path[:length]]}"
                return flag if length == len(path) else f"{flag}: {dotted(path)}"
        if path and path not in self.lines:
            for beneath, text in self.overrides.items():  # which has made what it lies in
                if beneath[: len(path)] == path:
                    return f"--set {text}"
        line = next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), None)
        place = self.source if line is None or self.source is None else f"{self.source}:{line}"
        return ": ".join(part for part in (place, dotted(path)) if part) or None

    def override(self, assignments: Iterable[str]) -> None:
        """Applies KEY=VALUE settings; keys are dotted (`sweep.0.learning_rate`), values are YAML."""
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            path = _parse_key(key)
            if not equals or not path:
                raise UsageError(f"--set {assignment!r} is no setting", allowed="--set KEY=VALUE")
            value = Document.parse(text, f"--set {key.strip()}").data
            self._assign(path, value, key.strip())

    def _assign(self, path: KeyPath, value: Any, key: str) -> None:
        if self.data is None:
            self.data = {}
        holder = self.data
        for depth, part in enumerate(path):
            _check_step(holder, part, path[:depth], key)
            if depth == len(path) - 1:
                _store(holder, part, value)
                break
            present = part in holder if isinstance(holder, dict) else part < len(holder)  # type: ignore[operator]
            if not present or holder[part] is None:
                _store(holder, part, [] if isinstance(path[depth + 1], int) else {})
            holder = holder[part]
        self.overrides = {known: text for known, text in self.overrides.items() if known[: len(path)] != path}
        self.overrides[path] = key


def from_data(data: Mapping[str, Any]) -> Document:
    """A document of data made in Python; tuples are read as lists."""
    return Document(_plain(data, 0))


def _plain(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise UsageError("the search space is nested too deeply", allowed=f"at most {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    return value


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        _check_depth(yaml.parse(text, Loader=Loader), source)
        node: yaml.Node | None = yaml.compose(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = "" if mark is None else f":{mark.line + 1}"
        problem = error.problem or error.context or "it cannot be read"
        if mark is not None and "\t" in _indent(text, mark.line):
            problem = "a tab indents this line, and YAML takes spaces only"
        raise UsageError(f"no valid YAML: {problem}", where=f"{source}{line}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "reason", None) or "it cannot be read"
        raise UsageError(f"no valid YAML: {problem}", where=source) from None
    return node


def _indent(text: str, line: int) -> str:
    whole = "".join(text.splitlines()[line : line + 1])
    return whole[: len(whole) - len(whole.lstrip())]


def _check_depth(events: Iterator[yaml.Event], source: str) -> None:
    """Before anything recursive touches the text."""
    depth = 0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            line = "" if event.start_mark is None else f":{event.start_mark.line + 1}"
            raise UsageError(
                "nested too deeply", where=f"{source}{line}", allowed=f"at most {MAX_DEPTH} levels"
            )


class _Builder:
    """Turns YAML nodes into plain data, and records lines."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.values = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.values += 1
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        if len(path) > MAX_DEPTH or self.values > MAX_VALUES:
            allowed = f"at most {MAX_DEPTH} levels and {MAX_VALUES} values, aliases counted"
            raise UsageError(
                "the file is too large once its aliases are followed", where=self._at(node), allowed=allowed
            )
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, "seq")
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        self._check_tag(node, "map")
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise UsageError(
                    "a key that is no plain word", where=self._at(key_node), allowed="text as keys"
                )
            key = key_node.value
            where = f"{self._at(key_node)}: {dotted((*path, key))}"
            if key in result:
                first = self.document.lines[(*path, key)]
                raise UsageError(f"key {key!r} is given twice (first in line {first})", where=where)
            self.document.lines[(*path, key)] = key_node.start_mark.line + 1
            result[key] = self.build(value_node, (*path, key))
        return result

    def _scalar(self, node: yaml.Node) -> Any:
        kind, text = node.tag.removeprefix(TAG), node.value
        try:
            if kind == "int":
                return int(text)
            if kind == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            raise UsageError(f"{text[:40]!r} is no number", where=self._at(node)) from None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "null":
            return None
        self._check_tag(node, "str")
        return text

    def _check_tag(self, node: yaml.Node, kind: str) -> None:
        if node.tag != TAG + kind:
            raise UsageError(
                f"the tag {node.tag!r} is not read here", where=self._at(node), allowed="plain YAML"
            )

    def _at(self, node: yaml.Node) -> str:
        return f"{self.document.source}:{node.start_mark.line + 1}"


def _parse_key(key: str) -> KeyPath:
    parts = re.sub(r"\[([0-9]+)\]", r".\1", key.strip()).split(".")
    if not all(parts):
        return ()
    return tuple(int(part) if part.isascii() and part.isdigit() else part for part in parts)


def _check_step(holder: Any, part: str | int, done: KeyPath, key: str) -> None:
    place = dotted(done) or "a search space"
    if isinstance(holder, dict):
        if isinstance(part, int):
            raise UsageError(f"--set {key}: {place} is no list, but {part} is an index", allowed="a key")
    elif isinstance(holder, list):
        if not isinstance(part, int) or part > len(holder):
            present = {0: "", 1: "0, "}.get(len(holder), f"0 to {len(holder) - 1}, ")
            allowed = f"as an index {present}or {len(holder)} for a new one"
            raise UsageError(f"--set {key}: {place} is a list of {len(holder)}", allowed=allowed)
    else:
        raise UsageError(f"--set {key}: {place} is one value and has no keys", remedy=f"set {place} itself")


def _store(holder: Any, part: Any, value: Any) -> None:
    if isinstance(holder, list) and part == len(holder):
        holder.append(value)
    else:
        holder[part] = value
