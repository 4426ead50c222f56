"""What commands take that only look: help, the table of a sweep, its state.

    python benchmarks/commands.py           21 times each, by turns
    python benchmarks/commands.py --times N

Beside them stands what importing the libraries takes that the table needs, without pandas, which it does not need, and
with it. Prints one JSON line per figure: the median in seconds, and its ratio to the import without, in the same turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from raysweep.results.reader import row_count  # noqa: E402
from tests.analysis.rows import quickstart_rows, write_sweep  # noqa: E402

STUDY = ROOT / "analysis" / "study" / "results" / "study"
LIBRARIES = "import typer, pydantic, rich.console, pyarrow.parquet"
IMPORTS = "importing Typer, pydantic, Rich and pyarrow"


def seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, *command],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=21)
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as storage:
        small = write_sweep(Path(storage) / "quickstart", quickstart_rows())
        raysweep = ["-m", "raysweep"]
        commands = {
            IMPORTS: ["-c", LIBRARIES],
            f"{IMPORTS}, and pandas": ["-c", f"{LIBRARIES}, pandas"],
            "raysweep --help": [*raysweep, "--help"],
            "raysweep launch --help": [*raysweep, "launch", "--help"],
            f"raysweep results of {row_count(small)} rows": [*raysweep, "results", str(small)],
            f"raysweep results of {row_count(STUDY)} rows": [*raysweep, "results", str(STUDY)],
            "raysweep status": [*raysweep, "status", "--storage", storage],
        }
        taken = {figure: list[float]() for figure in commands}
        for turn in range(times + 1):
            for figure, command in commands.items():
                found = seconds(command)
                if turn:  # the first one reads files that were not in memory, and may write bytecode
                    taken[figure].append(found)
    for figure, all_of_it in taken.items():
        ratio = median(each / imports for each, imports in zip(all_of_it, taken[IMPORTS], strict=True))
        line = {"figure": f"seconds of {figure}", "value": round(median(all_of_it), 3)}
        ends = {"least": round(min(all_of_it), 3), "most": round(max(all_of_it), 3)}
        print(json.dumps(line | ends | {"over_imports": round(ratio, 2)}), flush=True)


if __name__ == "__main__":
    main()
