"""Where a launch looks for a cluster: one that does not answer is told at once, or passed over if nobody named it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from raysweep.cluster import connect
from raysweep.cluster.connect import own_memory, running_address
from raysweep.errors import UsageError
from tests.cluster.test_nodes import GIB, V1, groups


@pytest.fixture(autouse=True)
def nobody_says_where(monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def listening() -> Iterator[str]:
    """The address of somebody who takes connections."""
    with socket.create_server(("", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def silent(listening) -> str:
    """An address at which nobody does."""
    with socket.create_server(("", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_an_address_where_somebody_listens_is_joined(listening):
    found = running_address(listening)
    assert found is not None
    assert found.rpartition(":")[2] == listening.rpartition(":")[2]


def test_one_where_nobody_does_is_refused_at_once(silent):
    with pytest.raises(UsageError, match="no Ray cluster answers"):
        running_address(silent)


def test_a_cluster_that_has_ended_and_that_nobody_named_is_passed_over(monkeypatch, silent):
    monkeypatch.setattr(connect, "canonicalize_bootstrap_address", lambda wanted: silent)
    assert running_address(None) is None
    with pytest.raises(UsageError, match="none runs on this machine"):
        running_address("auto")


def test_local_is_none():
    assert running_address("local") is None


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        (V1, {"memory/job/7/memory.limit_in_bytes": str(4 * GIB)}, 4 * GIB - connect.RAY_BYTES),
        ("0::/a/b\n", {"memory.max": str(3 * GIB), "a/memory.max": str(GIB)}, GIB // 2),
        ("0::/\n", {"memory.max": str(GIB)}, None),  # a container's, which Ray sees
        ("0::/a\n", {"a/memory.max": str(1 << 60)}, None),
        ("0::/a\n", {"a/memory.max": "max"}, None),
    ],
)
def test_a_new_cluster_keeps_to_limits_that_ray_does_not_see(tmp_path, own, files, left):
    memory = own_memory(**groups(tmp_path, own, files))
    assert (sum(memory.values()) or None) == left
