"""What a node says it has, against control groups laid out by hand in both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raysweep.cluster.nodes import cpu_limit, memory_limit, this_node

GIB = 1 << 30


def groups(folder: Path, own: str, files: dict[str, str]) -> dict[str, Path]:
    """The files under a root of control groups, and what /proc/self/cgroup would say."""
    for name, content in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    (folder / "own").write_text(own)
    return {"root": folder / "cgroup", "own": folder / "own"}


V1 = "9:name=systemd:/\n4:memory:/job/7\n1:cpu,cpuacct:/job\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "memory", "cpus"),
    [
        ("0::/\n", {"memory.max": str(3 * GIB), "cpu.max": "150000 100000"}, 3 * GIB, 1.5),
        ("0::/\n", {"memory.max": "max", "cpu.max": "max 100000"}, None, None),
        ("0::/a/b\n", {"a/memory.max": str(GIB), "a/b/memory.max": "max"}, GIB, None),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "100000 50000"}, None, 2.0),
        (V1, {"memory/job/7/memory.limit_in_bytes": str(GIB)}, GIB, None),
        (V1, {"memory/memory.limit_in_bytes": str(2 * GIB)}, 2 * GIB, None),  # seen from outside a container
        (V1, {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000"}, None, 0.5),
        (V1, {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, None, None),
        ("", {}, None, None),
    ],
)
def test_the_lowest_limit_of_a_group_and_those_above_it_counts(tmp_path, own, files, memory, cpus):
    where = groups(tmp_path, own, files)
    assert memory_limit(**where) == memory
    assert cpu_limit(**where) == cpus


def test_no_control_groups_are_no_limit(tmp_path):
    nowhere = {"root": tmp_path / "none", "own": tmp_path / "none either"}
    assert memory_limit(**nowhere) is None
    assert cpu_limit(**nowhere) is None


def test_this_node_has_no_more_than_the_machine():
    node = this_node()
    assert 0 < node.cpus <= len(os.sched_getaffinity(0))
    assert 0 < node.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
