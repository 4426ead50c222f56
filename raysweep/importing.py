"""Large libraries are imported faster while Python does not look for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collecting() -> Iterator[None]:
    """Python's collector stands still within the context. For imports: libraries such as transformers make
    objects that stay, and it would look through all of them again and again, for a fifth of the time that they take.

    What was made within counts as old afterwards. As something new it would be looked through three times, one
    generation after another: with torch and transformers a second.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if gc.get_freeze_count() == 0:  # else what somebody froze would come back
                gc.freeze()
                gc.unfreeze()  # into the oldest generation
            gc.enable()
