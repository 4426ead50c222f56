"""The same question to every node of a cluster."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysweep.errors import first_line


@dataclass(frozen=True)
class Answer:
    """What one node said.

    address: by which the cluster knows it;  object_store: bytes of it, or 0
    silence: why it said nothing
    """

    host: str
    address: str
    object_store: int
    value: Any = None
    silence: str | None = None

    @property
    def about(self) -> str:
        return f"{self.host} ({self.address})"


def ask_every_node(function: Callable[..., Any], *arguments: Any, timeout_s: float) -> list[Answer]:
    """Calls a function once on every living node of the connected cluster; nodes by address. One that leaves before it
    has answered is not among them.

    It is sent as code, so that it also runs where raysweep is missing or another version. It should return what
    needs no class of ours.
    """
    module = inspect.getmodule(function)
    if module is not None:
        ray.cloudpickle.register_pickle_by_value(module)
    nodes = sorted(
        (node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"]
    )
    ask: Any = ray.remote(function)
    asked = [
        ask.options(
            num_cpus=0,
            max_retries=0,
            name=f"ask {node['NodeManagerHostname']}",
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(*arguments)
        for node in nodes
    ]
    there, late = ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
    for ref in late:
        ray.cancel(ref, force=True)
    answers = {
        node["NodeID"]: _answer(node, ref, ref in there, timeout_s)
        for node, ref in zip(nodes, asked, strict=True)
    }
    left = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
    return [answer for node, answer in answers.items() if answer.silence is None or node not in left]


def _answer(node: dict[str, Any], ref: Any, is_there: bool, timeout_s: float) -> Answer:
    value, silence = None, None
    if not is_there:
        silence = f"no answer within {timeout_s:.0f} s"
    else:
        try:
            value = ray.get(ref)
        except ray.exceptions.RayError as error:
            silence = first_line(getattr(error, "cause", None) or error)
    store = int(node["Resources"].get("object_store_memory", 0))
    return Answer(node["NodeManagerHostname"], node["NodeManagerAddress"], store, value, silence)
