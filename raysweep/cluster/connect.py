"""Joins the Ray cluster that this machine is on, or starts a local one, and leaves behind what it found."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from raysweep.cluster.nodes import Node, this_node
from raysweep.errors import UsageError

LOCAL = "local"
NAMESPACE = "raysweep"


@dataclass(frozen=True)
class Cluster:
    """A cluster in use. started_here: it ends with us;  dashboard: address of its pages, if it has any."""

    nodes: tuple[Node, ...]
    started_here: bool
    dashboard: str | None


def running_address(address: str | None) -> str | None:
    """The cluster that would be joined: `address`, RAY_ADDRESS, or one that runs on this machine; None = a new one."""
    if address == LOCAL:
        return None
    wanted = address or os.environ.get("RAY_ADDRESS")
    if wanted and wanted not in ("auto", LOCAL):
        return wanted
    found = ray._private.services.canonicalize_bootstrap_address(None)  # what `ray status` looks up
    if found is None and wanted == "auto":
        raise UsageError("no Ray cluster runs on this machine", remedy="Start one with `ray start --head`.")
    return found


@contextmanager
def connected(address: str | None = None) -> Iterator[Cluster]:
    """A cluster for the length of the context. One that was running is left running.

    Raises UsageError when `address` names a cluster that does not answer.
    """
    found = running_address(address)
    _connect(found)
    try:
        dashboard = ray._private.worker.global_worker.node.webui_url if ray.is_initialized() else None
        yield Cluster(nodes(), found is None, f"http://{dashboard}" if dashboard else None)
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=address or LOCAL,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.WARNING,
            configure_logging=True,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address is None:
            raise
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"no Ray cluster answers at {address!r}: {reason}",
            allowed="HOST:PORT of a running cluster, auto, or local",
            remedy="Start one with `ray start --head`, or leave --address out for a local one.",
        ) from error


def nodes() -> tuple[Node, ...]:
    """What every living node of the connected cluster has in all, whoever uses it now."""
    return tuple(_node(entry["Resources"]) for entry in ray.nodes() if entry["Alive"])


def _node(resources: dict[str, float]) -> Node:
    gpus = int(resources.get("GPU", 0))
    memory = int(resources.get("memory", 0)) + int(resources.get("object_store_memory", 0))
    gpu_bytes = this_node().gpu_bytes if gpus else 0  # assumes that all nodes have GPUs like this one's
    return Node(resources.get("CPU", 0.0), gpus, memory, gpu_bytes)
