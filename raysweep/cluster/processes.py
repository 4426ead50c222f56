"""Processes beside the launching one, and what became of calls to them."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def actor_here(cls: type[Any]) -> Any:
    """A class whose instances are actors on this process's node, which take nothing from trials and are not restarted.
    On a cluster that was joined they are no children of this process, and do not have its environment."""
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(cls)
    return remote.options(num_cpus=0, scheduling_strategy=here)


def is_connected() -> bool:
    """Whether this process is part of a cluster. Where it is none, nearly every call of Ray's would start one."""
    return bool(ray.is_initialized())


def failure_of(call: Any) -> Exception | None:
    """Why a call failed; None where it did not, or has not ended."""
    try:
        ray.get(call, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return None
    except Exception as error:  # whatever the call raised
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, Exception) else error
    return None
