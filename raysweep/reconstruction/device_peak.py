"""The most memory that a process's allocator has handed out on a GPU, though units count theirs anew."""

from __future__ import annotations

import torch

# before the last `reset_peak`, since the process began and since `restart_peak`; the allocator is the process's as well
_highest: dict[torch.device, int] = {}
_lately: dict[torch.device, int] = {}


def reset_peak(device: torch.device) -> None:
    """Lets the allocator count its peak anew, and remembers the one so far."""
    _highest[device], _lately[device] = highest_peak(device), lately_highest(device)
    torch.cuda.reset_peak_memory_stats(device)


def highest_peak(device: torch.device) -> int:
    """Bytes, since the process began."""
    return max(_highest.get(device, 0), torch.cuda.max_memory_allocated(device))


def lately_highest(device: torch.device) -> int:
    """Bytes, since `restart_peak`."""
    return max(_lately.get(device, 0), torch.cuda.max_memory_allocated(device))


def restart_peak(device: torch.device) -> None:
    """Lets `lately_highest` begin anew."""
    reset_peak(device)
    _lately[device] = 0
