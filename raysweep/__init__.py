"""raysweep: sweeps of pruning and recovery for language models, on Ray. Names are imported at first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raysweep.config.space import SearchSpace
    from raysweep.launching.launch import launch
    from raysweep.reconstruction.api import Pruned, Recovered, prune, reconstruct
    from raysweep.results.reader import load_results, load_units

__version__ = "0.1.0"

__all__ = [
    "Pruned",
    "Recovered",
    "SearchSpace",
    "__version__",
    "launch",
    "load_results",
    "load_units",
    "prune",
    "reconstruct",
]

# Where each public name lives. Reading results must not import torch or Ray, so nothing is imported up front.
_HOMES = {
    "Pruned": "raysweep.reconstruction.api",
    "Recovered": "raysweep.reconstruction.api",
    "SearchSpace": "raysweep.config.space",
    "launch": "raysweep.launching.launch",
    "load_results": "raysweep.results.reader",
    "load_units": "raysweep.results.reader",
    "prune": "raysweep.reconstruction.api",
    "reconstruct": "raysweep.reconstruction.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
