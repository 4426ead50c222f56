"""What a shard has done since it was loaded. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """units: recovered here, those taken over from storage not counted; of several shards, by the last of them
    trained_tokens, evaluated_tokens: that have passed through units in training, and through the head
    """

    units: int = 0
    trained_tokens: int = 0
    evaluated_tokens: int = 0
