"""A planned trial with its identities. No torch, so that the processes of trials start fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raysweep.config.expansion import PlannedTrial
from raysweep.config.labels import label_of
from raysweep.config.trial import Trial
from raysweep.shards.retrained import RetrainingFolders

LABEL_LENGTH = 120  # in names: of files 255 bytes, of runs in trackers 128 characters are allowed


@dataclass(frozen=True)
class SweepTrial:
    """One trial of a sweep; `number` is its place in it, from 0.

    dense_id, pruned_id: of the trials whose models it is compared with: the dense one, and the one with its mask alone,
    if it is not its recovery that the mask comes from
    study: that chose it, by its key
    start_id: of one that is retrained, the identity of the weights that it starts from
    data_hash, data_tokens: of the token ids that it is trained on
    """

    planned: PlannedTrial
    recovery_id: str
    trial_id: str
    number: int
    dense_id: str
    pruned_id: str | None
    study: str | None = None
    start_id: str | None = None
    data_hash: str | None = None
    data_tokens: int = 0

    @property
    def trial(self) -> Trial:
        return self.planned.trial

    @property
    def unfinished(self) -> set[str]:
        """The identities under which work for this trial may wait to be gone on with."""
        found = (self.trial_id, self.start_id, self.dense_id, self.pruned_id)
        return {identity for identity in found if identity is not None}

    def retraining(self, sweep: Path) -> RetrainingFolders | None:
        """Where it is retrained, within the sweep's folder; None where it is not."""
        if self.start_id is None:
            return None
        return RetrainingFolders.of(sweep, self.recovery_id, self.start_id, self.data_tokens)

    @property
    def label(self) -> str:
        """A short name for people; names the calibration set where it is not the first seed's."""
        calibration = self.planned.calibration
        varied = (
            f" calibration.seed={calibration.seed}" if calibration is not None and calibration.seed else ""
        )
        return label_of(self.trial) + varied

    @property
    def file_name(self) -> str:
        """The label as a name of files and of Tune's trials; no two trials have the same."""
        words = "".join(letter if letter.isalnum() or letter in "._=+-" else "_" for letter in self.label)
        return f"{words[:LABEL_LENGTH]}_{self.trial_id[:6]}"
