"""The largest numbers that settings and options take. Apart from the settings: `raysweep --help` loads no pydantic."""

from __future__ import annotations

MAX_COUNT = 2**31 - 1
MAX_SEED = 2**63 - 1  # what an int64 column holds
