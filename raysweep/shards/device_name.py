"""The name of a GPU or a processor."""

from __future__ import annotations

import platform


def device_name(kind: str) -> str:
    """As rows and figures have it: of the GPU that this process works on (cuda), or of the processor (cpu)."""
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
