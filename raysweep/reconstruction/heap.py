"""The heap of this process, of which the C library keeps what was freed."""

from __future__ import annotations

import ctypes

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; others give back by themselves, or not


def give_back() -> None:
    """Gives the system all pages that nothing lies in. They come again, as zeros, when they are next written to."""
    if _trim is not None:
        _trim(0)
