"""The most memory that a shard has held. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Bytes since its process began. host: resident, of the whole process, 0 = unknown
    device: that the allocator of its GPU has handed out, what compiling took left out; None on a CPU
    """

    host: int
    device: int | None = None


def resident_peak() -> int:
    """Bytes of this process's memory at its highest (VmHWM); 0 where the system does not say."""
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        return 0
