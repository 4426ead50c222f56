"""A planned trial with its identities. No torch, so that the processes of trials start fast."""

from __future__ import annotations

from dataclasses import dataclass

from raysweep.config.expansion import PlannedTrial
from raysweep.config.labels import label_of
from raysweep.config.trial import Trial


@dataclass(frozen=True)
class SweepTrial:
    """One trial of a sweep; `number` is its place in it, from 0."""

    planned: PlannedTrial
    recovery_id: str
    trial_id: str
    number: int

    @property
    def trial(self) -> Trial:
        return self.planned.trial

    @property
    def label(self) -> str:
        """A short name for people; names the calibration set where it is not the first seed's."""
        calibration = self.planned.calibration
        varied = (
            f" calibration.seed={calibration.seed}" if calibration is not None and calibration.seed else ""
        )
        return label_of(self.trial) + varied
