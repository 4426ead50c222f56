"""What writers that were killed leave behind goes; what others are writing stays."""

from __future__ import annotations

import os

from raysweep.results import atomic
from raysweep.results.atomic import remove_stale_temporaries


def test_temporaries_of_living_writers_and_other_hosts_stay(tmp_path, monkeypatch):
    place = tmp_path / "trials"
    place.mkdir()
    living = place / atomic._temporary_name("a.parquet")
    dead = place / living.name.replace(f".{os.getpid()}.", ".4194305.")
    foreign = place / ".a.parquet.elsewhere.1.00ff00ff.tmp"
    for path in (living, dead, foreign):
        path.write_bytes(b"half")
    assert remove_stale_temporaries(tmp_path) == 1
    assert sorted(place.iterdir()) == sorted([living, foreign])
