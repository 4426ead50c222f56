"""The most memory that a process's allocator has handed out on a GPU, though units count theirs anew."""

from __future__ import annotations

import torch

_highest: dict[torch.device, int] = {}  # before the last `reset_peak`; the allocator is the process's as well


def reset_peak(device: torch.device) -> None:
    """Lets the allocator count its peak anew, and remembers the one so far."""
    _highest[device] = highest_peak(device)
    torch.cuda.reset_peak_memory_stats(device)


def highest_peak(device: torch.device) -> int:
    """Bytes, since the process began."""
    return max(_highest.get(device, 0), torch.cuda.max_memory_allocated(device))
