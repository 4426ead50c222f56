"""What a machine has: cores, memory, accelerators."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# Of the drivers that torch's GPUs need: NVIDIA's (which may make its device only when it is first used, so that its
# library counts as well), also on boards, AMD's, and that of Windows below Linux.
DRIVERS = tuple(
    map(Path, ("/dev/nvidiactl", "/sys/module/nvidia", "/dev/nvhost-gpu", "/dev/kfd", "/dev/dxg"))
)
LIBRARY = "libcuda.so.1"


@dataclass(frozen=True)
class Node:
    """One machine: CPUs and GPUs, host memory and the memory of one GPU in bytes (0 = unknown)."""

    cpus: float
    gpus: int
    memory_bytes: int
    gpu_bytes: int = 0


def this_node() -> Node:
    """What this process may use of the machine it runs on: a container's limits count, not what lies outside."""
    sizes = _gpu_bytes() if _has_driver() else []
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = float(len(os.sched_getaffinity(0)))
    return Node(
        cpus=min(cores, cpu_limit() or cores),
        gpus=len(sizes),
        memory_bytes=min(physical, memory_limit() or physical),
        gpu_bytes=min(sizes, default=0),
    )


def _has_driver() -> bool:
    """Whether torch may find a GPU: importing it to be told that there is none takes seconds."""
    if any(driver.exists() for driver in DRIVERS):
        return True
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def _gpu_bytes() -> list[int]:
    """Memory of each GPU here that torch can use."""
    import torch

    return [torch.cuda.get_device_properties(k).total_memory for k in range(torch.cuda.device_count())]


def memory_limit(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int | None:
    """Bytes that this process's control groups allow; None without a limit.

    Of version 2 (memory.max) and of version 1 (memory.limit_in_bytes), the lowest of the group and those above it.
    """
    found = [_number(folder / "memory.max") for folder in _folders(root, own, "")]
    found += [_number(folder / "memory.limit_in_bytes") for folder in _folders(root, own, "memory")]
    limits = [int(limit) for limit in found if limit is not None]
    return min(limits, default=None)


def cpu_limit(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> float | None:
    """CPUs that this process's control groups allow (quota over period, cpu.max or cpu.cfs_*); None without one."""
    pairs = [_words(folder / "cpu.max") for folder in _folders(root, own, "")]
    pairs += [
        _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        for folder in _folders(root, own, "cpu")
    ]
    limits = [
        int(pair[0]) / int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] not in ("max", "-1")
    ]
    return min(limits, default=None)


def _folders(root: Path, own: Path, controller: str) -> list[Path]:
    """The folders of this process's group and of those above it; of version 2 where `controller` is empty.

    A container may see the group's path from outside, where only the last folder up, the mount, is there.
    """
    mount = root / controller
    inside = mount / _own_group(own, controller).lstrip("/")
    return [folder for folder in (inside, *inside.parents) if folder.is_relative_to(mount)]


def _own_group(own: Path, controller: str) -> str:
    """The path of this process's group, from lines such as `4:memory:/a/b` and, of version 2, `0::/a/b`."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return "/"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0] != "max" else None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
