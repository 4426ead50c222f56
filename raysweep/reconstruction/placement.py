"""Where what a shard holds lies while it is not in hand. No torch, so that plans can say it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEVICE, HOST, DISK, FILES, ANEW = "device", "host", "disk", "files", "anew"

IN_HAND = 2  # blocks, where they come into hand one after another: the one at work, and the next
MADE = 3  # boundaries of a text that are held once they are made anew: input, middle and output of one block


@dataclass(frozen=True)
class Placement:
    """Of one shard. On a CPU `device` and `host` are the same memory.

    weights: dense ones of the blocks: device, host, or files: of the model, read block by block when they are needed
    trials: weights and masks of trials in flight: device, host or disk
    activations: at the boundaries of blocks: device, host or disk
    statistics: Gram matrices: device, host, disk, or anew: made again from the boundaries whenever they are needed
    every: of the boundaries between blocks every so many-th is kept, the others are made again from the one before
    halves: whether those within blocks are kept, where trials need them
    scratch: folder for what lies on disk
    """

    weights: str = DEVICE
    trials: str = DEVICE
    activations: str = HOST
    statistics: str = DEVICE
    every: int = 1
    halves: bool = True
    scratch: Path | None = None

    @property
    def waits(self) -> bool:
        """Whether blocks come into hand one after another."""
        return self.weights != DEVICE

    @property
    def together(self) -> int:
        """Batches of an evaluation that pass a block before the next one comes into hand: files would be read again for
        every batch."""
        return 8 if self.weights == FILES else 1

    @property
    def by_block(self) -> bool:
        """Whether texts pass as a whole through one block after another, because not everything has room at once."""
        return self.waits or self.statistics != DEVICE or self.every > 1 or not self.halves
