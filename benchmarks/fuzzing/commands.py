"""Command lines: commands, options, names, settings, storages and environments that are odd."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import yaml

from fuzzing.changes import WORDS, near_name, odd_value, paths_in
from fuzzing.site import SWEEP, Case, Site, small_space

COMMANDS = ("plan", "plan", "plan", "launch", "launch", "results", "status", "stop", "clean")
OPTIONS: dict[str, tuple[str, ...]] = {
    "plan": ("--set", "--set", "--set", "--name", "--storage", "--json"),
    "launch": (
        *("--set", "--set", "--name", "--storage", "--json", "--address"),
        *("--trace", "--retry-failed", "--fail-fast"),
    ),
    "results": ("--storage", "--sort", "--json"),
    "status": ("--storage", "--json"),
    "stop": ("--storage",),
    "clean": ("--storage",),
}
FLAGS = ("--json", "--trace", "--retry-failed", "--fail-fast", "--in-process", "--debug")
ADDRESSES = ("auto", "local", "1.2.3.4:6379", "nothing", "ray://", "ray://x:1", ":", "a:b:c", "[::1]:5", "-1")
NAMES = (
    "",
    ".",
    "..",
    "a/b",
    "../x",
    "/",
    "x" * 101,
    "x" * 5000,
    "a\x00b",
    "ü",
    "a\nb",
    "-x",
    "ok",
    " ",
    "\udcff",
)
SORTS = ("perplexity", "-perplexity", "nothing", "", "-", "--", "data", "started_at", "targets", "\udcff")
ENVIRONMENT: dict[str, tuple[str, ...]] = {
    "RAYSWEEP_STORAGE": ("", ".", "here", "~nobody_at_all/x", "/dev/null/x", "/proc/x", "x" * 5000, "\udcff"),
    "COLUMNS": ("", "0", "1", "20", "-5", "x", "²", "99999999", "9" * 5000, " 80"),
    "RAY_ADDRESS": ADDRESSES,
    "NO_COLOR": ("1",),
    "FORCE_COLOR": ("1", "x"),
    "TERM": ("dumb", "", "nothing"),
    "LINES": ("0", "x"),
    "HOME": ("/nowhere", "", "relative", "\udcff"),
}


def command_case(chance: random.Random, site: Site, folder: Path) -> Case:
    """A command line that is right but for one thing or a few, with nothing that it could write into by right."""
    command = chance.choice(COMMANDS)
    arguments = [command]
    if command in ("plan", "launch"):
        arguments += _space(chance, site)
        arguments += ["--in-process"] if command == "launch" and chance.random() < 0.7 else []
    elif chance.random() < 0.85:
        arguments.append(_name(chance, site) if chance.random() < 0.5 else SWEEP)
    if chance.random() < 0.6 and command not in ("plan", "launch"):
        arguments += ["--storage", str(site.storage)]
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        arguments += _option(chance, site, folder, chance.choice(OPTIONS[command]))
    if chance.random() < 0.08:
        arguments = _slip(chance, arguments)
    environment = {}
    if chance.random() < 0.3:
        variable = chance.choice(list(ENVIRONMENT))
        environment[variable] = chance.choice(ENVIRONMENT[variable])
    may_write = site.storage / SWEEP if command == "clean" else None
    return Case(arguments, environment, may_write)


def _space(chance: random.Random, site: Site) -> list[str]:
    draw = chance.random()
    if draw < 0.75:
        return [str(site.space)]
    if draw < 0.8:
        return []
    return [
        chance.choice(["quickstrat", "", ".", "/", str(site.model), "/dev/null", "~nobody_at_all/x", *NAMES])
    ]


def _name(chance: random.Random, site: Site) -> str:
    paths = [site.storage / SWEEP, site.storage, site.model, site.space, Path("~nobody_at_all/x")]
    return chance.choice([*NAMES, *map(str, paths), *WORDS])


def _option(chance: random.Random, site: Site, folder: Path, option: str) -> list[str]:
    if option in FLAGS:
        return [option]
    if option == "--set":
        return [option, _setting(chance, site)]
    (folder / "file").write_text("no folder")
    storages = [
        str(folder / "file"),
        str(folder / "file" / "x"),
        str(folder / "new"),
        "~nobody_at_all/x",
        "/proc/x",
    ]
    values: dict[str, list[str]] = {
        "--name": [*NAMES],
        "--storage": [*storages, *NAMES, *WORDS, "/dev/null"],
        "--address": [*ADDRESSES, *NAMES],
        "--sort": [*SORTS],
    }
    return [option, chance.choice(values[option])]


def _setting(chance: random.Random, site: Site) -> str:
    """KEY=VALUE of a key that is there, or nearly."""
    places = paths_in(small_space(site))
    extra = [
        ("search", "algorithm"),
        ("execution", "shards"),
        ("sweep", 5),
        ("sweep", 2, "recovery"),
        ("x",),
        ("",),
    ]
    place = list(map(str, chance.choice([*places, *extra])))
    draw = chance.random()
    if draw < 0.15:
        at = chance.randrange(len(place))
        place[at] = chance.choice([near_name(chance, place[at]), "-1", "99", "0x1", "²", "[0]", "a.b"])
    key = ".".join(place)
    value: Any = odd_value(chance)
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("...\n").strip()
    if draw > 0.9:
        text = chance.choice(
            ["[", "{", "'", "!!python/name:os.system", "*x", "&a [*a]", "a: b: c", "\udcff", "- " * 500]
        )
    return chance.choice(
        [f"{key}={text}"] * 9 + [key, f"{key}:{text}", f"={text}", f"{key}==", f" {key} = {text}"]
    )


def _slip(chance: random.Random, arguments: list[str]) -> list[str]:
    changed = list(arguments)
    place = chance.randrange(len(changed))
    how = chance.randrange(4)
    if how == 0:
        changed[place] = near_name(chance, changed[place])
    elif how == 1:
        del changed[place]
    elif how == 2:
        changed.insert(
            place, chance.choice(["--nothing", "-x", "--", "--help", "--version", "--debug", "-h"])
        )
    else:
        changed.append(chance.choice([*NAMES, "--set", "--name", os.sep]))
    return changed
