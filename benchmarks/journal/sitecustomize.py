"""Notes every unit that a process of raysweep begins and ends to recover, for `kills.py`: loaded by Python itself.

A folder with this file on PYTHONPATH and a file's name in RAYSWEEP_JOURNAL switch it on, in workers of Ray as well.
Lines are appended whole, so that those of a killed process are complete.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from types import ModuleType
from typing import Any

WATCHED = "raysweep.shards.worker"
JOURNAL = os.environ.get("RAYSWEEP_JOURNAL")


def note(*words: object) -> None:
    descriptor = os.open(str(JOURNAL), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (" ".join(map(str, (*words, os.getpid()))) + "\n").encode())
    os.close(descriptor)


def watch(module: ModuleType) -> None:
    note("shard", "-", "-", 0)
    recover, forward = module.recover_unit, module.ShardWorker.forward

    def noting(blocks: Any, name: str, trial: Any, unit: str, recovered: Any = None) -> Any:
        if recovered is not None:
            note("taken", name, unit, 0)
            return recover(blocks, name, trial, unit, recovered)
        note("begin", name, unit, 0)
        result = recover(blocks, name, trial, unit)
        note("end", name, unit, result.steps if result is not None else 0)
        return result

    def noting_batch(self: Any, name: Any, text: str, start: int, stop: int, *more: Any) -> Any:
        if self.shard.is_last:
            note("batch", name, f"{text}[{start}:{stop}]", stop - start)
        return forward(self, name, text, start, stop, *more)

    module.recover_unit, module.ShardWorker.forward = noting, noting_batch  # type: ignore[attr-defined]


class Finder(importlib.abc.MetaPathFinder):
    """Hands out the watched module as it is, changed once it has been loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), watch(module))  # type: ignore[method-assign]
        return spec


if JOURNAL:
    sys.meta_path.insert(0, Finder())
