"""What a machine has: cores, memory, accelerators."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """One machine: CPUs and GPUs, host memory and the memory of one GPU in bytes (0 = unknown)."""

    cpus: float
    gpus: int
    memory_bytes: int
    gpu_bytes: int = 0


def this_node() -> Node:
    """The machine that this process runs on."""
    import torch

    gpus = torch.cuda.device_count()
    sizes = [torch.cuda.get_device_properties(k).total_memory for k in range(gpus)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Node(float(len(os.sched_getaffinity(0))), gpus, memory, min(sizes, default=0))
