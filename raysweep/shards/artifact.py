"""Leaves the weights of a trial on storage while the shards still hold them. No torch.

Whatever goes wrong there costs the trial its place among the kept ones, never its row.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysweep.errors import RaysweepError, ShardLostError, first_line
from raysweep.results.artifacts import remove_artifact
from raysweep.results.folders import OUTSIDE, block_file
from raysweep.shards.calls import Calls

ROOM = 2  # of what it takes must be free: rows that cannot be written would end the sweep


@dataclass(frozen=True)
class Artifact:
    """Where the weights of a trial stay, if it is one of those that are kept.

    wants: whether a trial with such numbers is;  what is written is no kept trial yet: its row comes with `Kept`
    """

    folder: Path
    wants: Callable[[Mapping[str, Any]], bool]

    def fill(
        self, calls: Calls, name: str, masks: str | None = None, beside: Path | None = None
    ) -> str | None:
        """Has every shard write the blocks that lie under a name; returns why that could not be done, else None.

        masks: the name that the masks lie under, if it is another
        beside: a folder that may hold what lies outside of the blocks
        """
        remove_artifact(self.folder)  # of an attempt that has no row
        try:
            self._check_room(sum(calls.everywhere("written_bytes", name, masks)))
            calls.everywhere("write_weights", name, self.folder, masks, False)
            if beside is not None and block_file(beside, OUTSIDE).exists():
                shutil.copyfile(block_file(beside, OUTSIDE), block_file(self.folder, OUTSIDE))
            self._check_whole(calls.info.blocks)
        except ShardLostError:
            raise
        except Exception as error:  # whatever it is, the trial is measured
            calls.settle()  # shards may still be writing
            remove_artifact(self.folder)
            return first_line(error)
        return None

    def _check_room(self, nbytes: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < ROOM * nbytes:
            raise RaysweepError(
                f"its weights take {nbytes:,} bytes, and {free:,} are free in {self.folder.parent}"
            )

    def _check_whole(self, blocks: int) -> None:
        missing = [index for index in range(blocks) if not block_file(self.folder, index).exists()]
        if missing:
            raise RaysweepError(f"block {missing[0]} was written to another {self.folder.parent} than here")
