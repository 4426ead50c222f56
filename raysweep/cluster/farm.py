"""The same function for each of many arguments, on processes of their own over the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from raysweep.errors import RaysweepError, first_line

Argument = TypeVar("Argument")


@dataclass(frozen=True)
class Reserved:
    """What a call reserves on one node: GPUs, which it alone sees, and bytes of the memory that Ray counts there."""

    cpus: float
    gpus: int = 0
    memory: int = 0


def run_each(
    function: Callable[[Argument], Any],
    arguments: Sequence[Argument],
    reserved: Reserved,
    at_once: int,
    name: str,
) -> Iterator[tuple[Argument, Any]]:
    """Every argument with what the function returns, or the exception that it raises, as they are done.

    reserved: by each call;  at_once: calls that are at work
    A call whose process ends is tried once more, then stands for itself as a RaysweepError. When the caller stops
    listening, calls that are at work are ended.
    """
    remote: Any = ray.remote(
        num_cpus=reserved.cpus, num_gpus=reserved.gpus, memory=reserved.memory, max_retries=1, max_calls=1
    )
    call = remote(function).options(name=name)
    waiting, running = list(reversed(arguments)), dict[Any, Argument]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                argument = waiting.pop()
                running[call.remote(argument)] = argument
            (done,), _ = ray.wait(list(running))
            yield running.pop(done), _result(done)
    finally:
        for ref in running:
            ray.cancel(ref, force=True)


def _result(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        return cause if isinstance(cause, Exception) else RaysweepError(first_line(error))
    except ray.exceptions.RayError as error:
        return RaysweepError(f"its process ended: {first_line(error)}")
