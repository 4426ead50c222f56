"""Where a space lets weights, activations and statistics lie, and what plans make of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from raysweep.reconstruction.placement import ANEW, DEVICE, DISK, FILES, HOST, Placement

AUTO, ALL = "auto", "all"

ON_GPUS = (
    Placement(DEVICE, DEVICE, DEVICE, DEVICE),
    Placement(DEVICE, DEVICE, HOST, DEVICE),
    Placement(HOST, HOST, HOST, HOST),
    Placement(HOST, HOST, HOST, HOST, halves=False),
    Placement(HOST, HOST, HOST, ANEW, halves=False),
    Placement(HOST, HOST, DISK, ANEW),
    Placement(FILES, DISK, DISK, ANEW),
    Placement(FILES, DISK, DISK, ANEW, every=4, halves=False),
)
ON_CPUS = (
    Placement(DEVICE, DEVICE, HOST, DEVICE),
    Placement(DEVICE, DEVICE, DISK, DEVICE),
    Placement(FILES, DISK, DISK, DISK),
    Placement(FILES, DISK, DISK, ANEW, every=4, halves=False),
)
"""Fastest first: copies over a GPU's link cost less than what a GPU computes anew, and this less than files; a CPU
reads files sooner than it computes anew."""


@dataclass(frozen=True)
class Stores:
    """The settings of `execution` of these names; `auto` leaves one to the plan.

    weights: device, host or disk;  activations: device, host or disk;  statistics: device, host, disk or anew
    boundaries: all, or every so many-th of those between blocks;  scratch: folder for what lies on disk
    """

    weights: str = AUTO
    activations: str = AUTO
    statistics: str = AUTO
    boundaries: str | int = AUTO
    scratch: str | None = None

    def placements(self, device: str) -> list[Placement]:
        """Those that the settings allow, the fastest first."""
        ladder = ON_CPUS if device == "cpu" else ON_GPUS
        return list(dict.fromkeys(self._allowed(placement, device) for placement in ladder))

    def _allowed(self, placement: Placement, device: str) -> Placement:
        here = {HOST: DEVICE} if device == "cpu" else {}  # the same memory
        if self.weights != AUTO:
            weights = here.get(self.weights, self.weights)
            placement = replace(placement, weights=FILES if weights == DISK else weights, trials=weights)
        if self.activations != AUTO:
            placement = replace(placement, activations=self.activations)
        if device == "cpu" and placement.activations == DEVICE:
            placement = replace(placement, activations=HOST)
        if self.statistics != AUTO:
            placement = replace(placement, statistics=here.get(self.statistics, self.statistics))
        if self.boundaries != AUTO:
            every = 1 if self.boundaries == ALL else int(self.boundaries)
            placement = replace(placement, every=every, halves=self.boundaries == ALL)
        return replace(placement, scratch=Path(self.scratch).absolute() if self.scratch else None)
