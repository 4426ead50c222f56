"""Notes every unit and every batch that a shard begins and ends, for `kills.py`: loaded by Python itself.

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
    worker = module.ShardWorker  # type: ignore[attr-defined]
    recover, forward, measure = module.recover_unit, worker.forward, worker.measure  # type: ignore[attr-defined]
    begin_training, end_training = worker.begin_training, worker.end_training

    def noting(blocks: Any, name: str, trial: Any, unit: str, recovered: Any = None) -> Any:
        if recovered is not None:
            note("taken", name, unit, 0)
            return recover(blocks, name, trial, unit, recovered)
        note("begin-unit", name, unit, 0)
        result = recover(blocks, name, trial, unit)
        note("end-unit", name, unit, result.steps if result is not None else 0)
        return result

    def noting_begin(self: Any, name: str) -> Any:
        if begins_here(self, name):
            note("begin-unit", name, unit_of(self, name), 0)
        return begin_training(self, name)

    def noting_end(self: Any, name: str) -> Any:
        cost = end_training(self, name)
        if begins_here(self, name):
            note("end-unit", name, unit_of(self, name), cost.steps)
        return cost

    def noting_batch(
        self: Any, name: Any, ends_here: bool, text: str, start: int, stop: int, *more: Any
    ) -> Any:
        if self.shard.is_last:
            note("begin-batch", model_of(name), f"{text}[{start}:{stop}]", 0)
        found = forward(self, name, ends_here, text, start, stop, *more)
        if self.shard.is_last and ends_here:
            note_end(self, name, text, start, stop)
        return found

    def noting_measure(self: Any, name: Any, text: str, start: int, stop: int, before: Any) -> Any:
        found = measure(self, name, text, start, stop, before)
        note_end(self, name, text, start, stop)
        return found

    module.recover_unit, worker.forward = noting, noting_batch  # type: ignore[attr-defined]
    worker.measure = noting_measure
    worker.begin_training, worker.end_training = noting_begin, noting_end


def note_end(worker: Any, name: Any, text: str, start: int, stop: int) -> None:
    tokens = (stop - start) * worker._ids[text].shape[1]
    note("end-batch", model_of(name), f"{text}[{start}:{stop}]", tokens)


def model_of(name: str | None) -> str:
    """Of weights that are evaluated under a trial's name; a pruned model is evaluated once for all, by any of them."""
    return "dense" if name is None else name.partition("@")[0] if name.startswith("pruned-") else name


def unit_of(worker: Any, name: str) -> str:
    """The unit that a trial trains over several shards."""
    return str(worker._parts[name].unit.name)


def begins_here(worker: Any, name: str) -> bool:
    """Whether its first block lies in this shard, which speaks for all of them."""
    first = int(unit_of(worker, name).partition("-")[0])
    return bool(worker.spec.start <= first < worker.spec.stop)


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
