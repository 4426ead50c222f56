"""Imports only go down the layers, Ray stays in its rooms, reading results needs neither torch nor Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "raysweep"

# From top to bottom. A room imports from lower floors; on its own floor only what SAME_FLOOR lists.
FLOORS = (
    ("cli",),
    ("launching",),
    ("sweep", "baseline", "analysis"),
    ("shards",),
    ("cluster",),
    ("reconstruction",),
    ("model",),
    ("pruning", "results"),
    ("config", "fingerprint", "errors", "importing", "at_once"),
)
SAME_FLOOR = {("config", "errors"), ("fingerprint", "config"), ("fingerprint", "errors")}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Who may import which parts of Ray: shards and cluster its core, sweep only Tune and callbacks, baseline only Train.
RAY = {
    "shards": ("ray",),
    "cluster": ("ray",),
    "sweep": ("ray.tune", "ray.air.integrations"),
    "baseline": ("ray.train",),
}

HEAVY = ("torch", "transformers", "datasets", "ray")
LIGHT_ROOMS = ("config", "fingerprint", "errors", "results", "analysis")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> Iterator[str]:
    """Every module or name that `source` imports, at any depth: `from ray import tune` is ray.tune."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def wrong_imports(room: str, source: str) -> list[str]:
    return [name for name in imported(source) if not is_allowed(room, name)]


def is_allowed(room: str, name: str) -> bool:
    if is_inside(name, "ray"):
        return any(is_inside(name, part) for part in RAY.get(room, ()))
    if room in LIGHT_ROOMS and any(is_inside(name, heavy) for heavy in HEAVY):
        return False
    if room == "pruning" and (is_inside(name, "transformers") or is_inside(name, "datasets")):
        return False
    if not is_inside(name, "raysweep") or name.removeprefix("raysweep.") == "__version__":
        return True
    other = name.split(".")[1] if "." in name else ""
    if other not in FLOOR_OF:
        return False
    if FLOOR_OF[other] == FLOOR_OF[room]:
        return room == other or (room, other) in SAME_FLOOR
    return FLOOR_OF[other] > FLOOR_OF[room]


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) not in ("__init__", "__main__"))


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(PACKAGE)) for path in SOURCES])
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR_OF, f"{path} belongs to no layer"
    assert wrong_imports(room, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("model", "from raysweep.shards.plan import Plan"),
        ("sweep", "from raysweep.baseline import train"),
        ("results", "def read():\n    import torch"),
        ("pruning", "from raysweep.results import schema"),
        ("config", "import raysweep"),
        ("sweep", "import ray"),
        ("sweep", "from ray import tune, remote"),
        ("sweep", "import ray.air.session"),
        ("baseline", "from ray.tune import Tuner"),
        ("cli", "import ray"),
        ("reconstruction", "import ray.util"),
        ("pruning", "from transformers import AutoConfig"),
    ],
)
def test_a_wrong_import_is_seen(room: str, source: str) -> None:
    assert len(wrong_imports(room, source)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("sweep", "from ray import tune\nfrom ray.tune import Tuner\nfrom raysweep.shards.plan import Plan"),
        ("shards", "import ray\nfrom ray.util.placement_group import placement_group"),
        (
            "model",
            "import raytracer\nfrom raysweep.errors import UsageError\nfrom raysweep import __version__",
        ),
    ],
)
def test_a_right_import_passes(room: str, source: str) -> None:
    assert wrong_imports(room, source) == []


def loaded_by(code: str) -> set[str]:
    """The heavy libraries that are loaded once a fresh interpreter has run `code`."""
    report = f"\nimport sys\nprint(*[name for name in {(*HEAVY, 'pandas')!r} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(run.stdout.split())


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_what_reads_configuration_and_results_loads_neither_torch_nor_ray() -> None:
    modules = [module_name(path) for path in SOURCES if room_of(path) in LIGHT_ROOMS]
    code = "\n".join(["import raysweep", *(f"import {module}" for module in modules)])
    assert loaded_by(code).isdisjoint(HEAVY)


def test_the_package_and_its_commands_start_light() -> None:
    assert loaded_by("import raysweep") == set()
    assert loaded_by("import raysweep.cli.main").isdisjoint(HEAVY)


def test_text_is_read_without_torch() -> None:
    assert loaded_by("import raysweep.model.tokens").isdisjoint(HEAVY)


def test_what_a_launch_does_before_ray_starts_needs_no_torch() -> None:
    """What it knows of a model and its text is kept (`known_shapes`, `known_tokens`), and torch takes seconds."""
    code = "import raysweep.launching.launch, raysweep.launching.outlook, raysweep.shards.rates"
    code += "\nfrom raysweep.cluster import nodes\nnodes.DRIVERS, nodes.LIBRARY = (), 'none'"
    code += "\nassert nodes.this_node().gpus == 0"
    assert loaded_by(code).isdisjoint({"torch", "transformers", "datasets"})


def test_every_public_name_can_be_used() -> None:
    code = "import raysweep\nfor name in raysweep.__all__:\n    getattr(raysweep, name)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import raysweep

    with pytest.raises(AttributeError, match="no attribute 'lunch'"):
        _ = raysweep.lunch
    assert "launch" in dir(raysweep)
