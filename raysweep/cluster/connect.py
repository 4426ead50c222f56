"""Joins the Ray cluster that this machine is on, or starts a local one, and leaves behind what it found."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.services import (
    canonicalize_bootstrap_address,
)  # what `ray.init` looks a running cluster up with

from raysweep.cluster.nodes import CGROUPS, OWN_CGROUPS, Node, memory_limit, this_node
from raysweep.cluster.token import keep_token_private
from raysweep.errors import UsageError, first_line

LOCAL, AUTO = "local", "auto"
ANSWER_S = 5.0  # that a cluster has to take a connection
NAMESPACE = "raysweep"
RAY_BYTES = 1280 << 20  # of a new cluster with its dashboard (measured: 750 MiB), and of who launches (570)
STORE_SHARE = 0.3  # of memory that Ray's object store may fill; Ray's own default

# Of a cluster that is started here. Ray looks for its object store while that still starts, and again after this time:
# by default a second, which every third start took longer. As before it gives up after ten.
QUICK_LOOKS = {
    "RAY_raylet_client_connect_timeout_milliseconds": "50",
    "RAY_raylet_client_num_connect_attempts": "200",
}


class TokenRefusedError(UsageError):
    """A cluster asks for another token than this process has."""


@dataclass(frozen=True)
class Cluster:
    """A cluster in use.

    dashboard: address of its pages, if it has any
    here: the resource that only this machine's node has, to keep what writes rows where the storage is
    """

    nodes: tuple[Node, ...]
    dashboard: str | None
    here: str
    ray_version: str = ray.__version__


def running_address(address: str | None) -> str | None:
    """The cluster that would be joined: `address`, RAY_ADDRESS, or one that runs on this machine; None = a new one.

    Raises UsageError for `auto` where none runs, and for an address that is none.
    """
    wanted = address or os.environ.get("RAY_ADDRESS") or None
    if wanted == LOCAL:
        return None
    try:
        found: str | None = canonicalize_bootstrap_address(wanted)  # type: ignore[arg-type]
    except (ValueError, OSError) as error:
        raise _no_cluster(str(wanted), str(error)) from error
    if found is not None and (reason := _silence(found)) is not None:
        if wanted is not None and wanted != AUTO:
            raise _no_cluster(found, reason)
        found = None  # of a cluster that has ended without saying so
    if found is None and wanted == AUTO:
        raise _no_cluster(AUTO, "none runs on this machine")
    return found


def _silence(address: str) -> str | None:
    """Why nobody listens at HOST:PORT, where Ray itself would try for minutes; None where somebody does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except (OSError, ValueError, OverflowError) as error:
        return first_line(error)
    return None


@contextmanager
def connected(address: str | None = None) -> Iterator[Cluster]:
    """A cluster for the length of the context: the one at `address`, or with None a new one on this machine.

    One that was running is left running. Raises UsageError when `address` does not answer.
    """
    try:
        context = _connect(address)
        dashboard = context.dashboard_url
        here = f"node:{ray.util.get_node_ip_address()}"  # Ray gives every node such a resource, of amount 1
        yield Cluster(nodes(), f"http://{dashboard}" if dashboard else None, here)
    finally:
        ray.shutdown()


def _connect(address: str | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        keep_token_private()
        for name, value in QUICK_LOOKS.items():
            os.environ.setdefault(name, value)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # tells at length that it is on
    try:
        with _sigterm_answered_as_before():
            return ray.init(
                address=address or LOCAL,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.WARNING,
                **(own_memory() if address is None else {}),
            )
    except ray.exceptions.AuthenticationError as error:
        raise _refused(address, first_line(error)) from error
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address is None:
            raise
        if any("InvalidAuthToken" in said for said in _causes(error)):
            raise _refused(address, "it asks for another token") from error
        raise UsageError(
            f"the Ray cluster at {address!r} cannot be joined: {' '.join(str(error).split())[:400]}",
            allowed="a cluster with this Python and this version of Ray",
            remedy="Use --address local for one of your own.",
        ) from error


def own_memory(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> dict[str, Any]:
    """What a cluster that is started here may use, as `ray.init` takes it, where Ray would take too much.

    It looks at the outermost control group alone, which is a container's; those within (of a batch system's job, of a
    service) may allow less, and the system ends whatever passes that.
    """
    limit, seen = memory_limit(root, own), memory_limit(root, Path(os.devnull))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if limit is None or limit >= min(seen or physical, physical):
        return {}
    left = max(limit - RAY_BYTES, limit // 2)
    store = int(left * STORE_SHARE)
    return {"object_store_memory": store, "_memory": left - store}


def _causes(error: BaseException) -> Iterator[str]:
    """What an error says, and what it came of."""
    current: BaseException | None = error
    while current is not None:
        yield str(current)
        current = current.__cause__ or current.__context__


def _refused(address: str | None, reason: str) -> TokenRefusedError:
    return TokenRefusedError(
        f"the Ray cluster at {address or LOCAL!r} refuses this process: {reason}",
        remedy="Set RAY_AUTH_MODE=token and put the cluster's token into ~/.ray/auth_token.",
    )


@contextmanager
def _sigterm_answered_as_before() -> Iterator[None]:
    """ray.init replaces the process's handler of SIGTERM; who launches has one that ends a sweep cleanly."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def nodes() -> tuple[Node, ...]:
    """What every living node of the connected cluster has in all, whoever uses it now."""
    entries = sorted(ray.nodes(), key=lambda entry: str(entry["NodeID"]))  # so that equal clusters are equal
    return tuple(_node(entry["Resources"]) for entry in entries if entry["Alive"])


def reservable_share() -> float:
    """Of the memory of a node, as `nodes` counts it, what calls can reserve: the smallest part of all nodes."""
    both = [
        (entry["Resources"].get("memory", 0.0), entry["Resources"].get("object_store_memory", 0.0))
        for entry in ray.nodes()
        if entry["Alive"]
    ]
    return min((memory / (memory + other) for memory, other in both if memory), default=0.0)


def _node(resources: dict[str, float]) -> Node:
    gpus = int(resources.get("GPU", 0))
    memory = int(resources.get("memory", 0)) + int(resources.get("object_store_memory", 0))
    gpu_bytes = this_node().gpu_bytes if gpus else 0  # assumes that all nodes have GPUs like this one's
    return Node(resources.get("CPU", 0.0), gpus, memory, gpu_bytes)


def _no_cluster(address: str, reason: str) -> UsageError:
    return UsageError(
        f"no Ray cluster answers at {address!r}: {reason}",
        allowed="HOST:PORT of a running cluster, auto, or local",
        remedy="Start one with `ray start --head`, or use --address local.",
    )
