"""Gives the commands thousands of generated inputs: each must be valid, or refused with a message of ours.

    python benchmarks/fuzz.py                              10,000 inputs, and 200 of the valid spaces really run
    python benchmarks/fuzz.py --inputs 300 --runs 5        fewer, in the same proportions
    python benchmarks/fuzz.py --only data --case 17        one of them again, with what it printed

Kinds: YAML text, typed search spaces, data files, rows in a storage, weights (safetensors), configuration and
tokenizer of a model, command lines. Each input is made of the seed, its kind and its number alone, and goes through the
entry function of the command, in one process for many. Right are: status 0 after `plan` (a launch ends where it
would begin) with nothing written; status 2 with a message of ours on stderr, an empty stdout and nothing written. Wrong
are: any other status, a traceback, an error that was not foreseen, a file written anywhere, more than LIMIT_S, a dead
process. Then valid spaces are really launched (without Ray) on a model of two blocks, some with weights that are no
numbers: every planned trial must have a row, finished with finite numbers, or failed with a reason.

Prints one JSON line per figure and one for each input that ended wrong, and ends with status 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fuzzing.commands import command_case
from fuzzing.files import config_case, data_case, results_case, weights_case
from fuzzing.judge import Ending, Judge
from fuzzing.site import Case, Site, build_site
from fuzzing.spaces import typed_case, yaml_case

Make = Callable[[random.Random, Site, Path], Case]

KINDS: dict[str, Make] = {
    "yaml": yaml_case,
    "space": typed_case,
    "data": data_case,
    "results": results_case,
    "weights": weights_case,
    "config": config_case,
    "command": command_case,
}
SHARES = {"yaml": 25, "space": 25, "data": 12, "results": 12, "weights": 8, "config": 8, "command": 10}
RUN = "run"
LIMIT_S, RUN_LIMIT_S = 30.0, 120.0  # of one input: seconds at most, on a machine that others use too
GRACE_S = 30.0  # then its process is killed
SPARE_BYTES = 4 << 30  # of address space, beyond what the libraries take
MOST_ANSWERS = 500  # of a process, before the next kind has one of its own
MOST_TRIALS = 8  # of a space that is really run


def report(figure: str, **values: Any) -> None:
    print(json.dumps({"figure": figure} | values), flush=True)


def chance_of(seed: int, kind: str, number: int) -> random.Random:
    return random.Random(f"{seed}/{kind}/{number}")


def split(inputs: int) -> dict[str, int]:
    """How many inputs of each kind."""
    counts = {kind: inputs * share // 100 for kind, share in SHARES.items()}
    return counts | {"yaml": counts["yaml"] + inputs - sum(counts.values())}


class Bench:
    """In a worker: makes inputs of the seed and has them judged, each in a folder of its own."""

    def __init__(self, root: Path, seed: int) -> None:
        self.site, self.seed, self.judge = Site(root / "site"), seed, Judge(root)
        self.folder = root / "case"

    def one(self, kind: str, number: int) -> tuple[Case, Ending, dict[str, Any]]:
        """The input, how it ended, and what else is to be counted."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        make = KINDS["space" if kind == RUN else kind]
        case = make(chance_of(self.seed, "space" if kind == RUN else kind, number), self.site, self.folder)
        if kind == RUN:
            return self._run(case)
        ending = self.judge.run(case, self.folder, LIMIT_S)
        more = {}
        if kind == "space" and ending.status == 0 and ending.problem is None:
            more["runnable"] = self._is_runnable(case)
        return case, ending, more

    def _is_runnable(self, case: Case) -> bool:
        """Few trials, none retrained (that is a phase with processes of its own) or stopped by a scheduler of Ray's."""
        from raysweep.config.space import SearchSpace

        space = SearchSpace.from_yaml(Path(case.arguments[1]))
        trials = space.typical()
        is_retrained = any(one.trial.recovery == "retrain" for one in trials)
        return len(trials) <= MOST_TRIALS and not is_retrained and space.search.scheduler == "none"

    def _run(self, case: Case) -> tuple[Case, Ending, dict[str, Any]]:
        case.may_write = self.folder / "results"  # and the caches of libraries, below HOME
        given = [word for word in case.arguments[1:] if word != "--no-probe"]
        case.arguments = ["launch", *given, "--in-process", "--json"]
        ending = self.judge.run(case, self.folder, RUN_LIMIT_S, really=True)
        if ending.problem is not None:
            return case, ending, {}
        if ending.status not in (0, 1):
            ending.problem = f"valid by plan, and launch ended with {ending.status}: {ending.err[-400:]}"
            return case, ending, {}
        rows = json.loads(ending.out)["rows"]
        ending.problem = self._wrong_rows(case, rows, ending.status)
        kinds = Counter(f"failed: {row['error_kind']}" if row["error"] else row["status"] for row in rows)
        return case, ending, {"rows": dict(kinds)}

    def _wrong_rows(self, case: Case, rows: list[dict[str, Any]], status: int) -> str | None:
        """What a launch said of its trials and may not. Rows with numbers that are not finite are not read, so that one
        would be missing."""
        from raysweep.config.space import SearchSpace

        planned = len(SearchSpace.from_yaml(Path(case.arguments[1])).typical())
        failed = [row for row in rows if row["status"] == "failed"]
        nameless = [row["label"] for row in failed if not row["error"] or not row["error_kind"]]
        empty = [row["trial_id"] for row in rows if row["status"] == "finished" and row["perplexity"] is None]
        if len(rows) != planned:
            return f"{planned} trials planned, {len(rows)} rows"
        if nameless or empty:
            return f"failed without a reason: {nameless}; finished without a number: {empty}"
        foreign = [row["error"] for row in failed if row["error_kind"] == "other" and not _is_own_fault(row)]
        if foreign:
            return f"failed for a reason that plan could have seen: {foreign[0]}"
        if bool(failed) != (status == 1):
            return f"{len(failed)} rows failed, and the status is {status}"
        return None


def _is_own_fault(row: dict[str, Any]) -> bool:
    """Whether the user's own function failed, which nobody can know before."""
    criterion = str(row["criterion"])
    return ":" in criterion and not criterion.startswith("file:")


def work(root: Path, seed: int) -> None:
    """A worker: for each line on stdin, kind and number of an input, one JSON line on stdout."""
    sys.dont_write_bytecode = True
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    bench = _bench(root, seed)
    for request in sys.stdin:
        kind, number = request.split()
        case, ending, more = bench.one(kind, int(number))
        line = {"number": int(number), "status": ending.status, "seconds": round(ending.seconds, 3), **more}
        if ending.problem:
            line |= {"problem": ending.problem, "arguments": [each[:200] for each in case.arguments]}
            line |= {"environment": case.environment}
        print(json.dumps(line), file=answers)


def _bench(root: Path, seed: int) -> Bench:
    if not (root / "site").exists():
        build_site(root / "site")
    bench = Bench(root, seed)
    _warm_up(bench)
    return bench


def _warm_up(bench: Bench) -> None:
    """Loads the libraries, and limits the memory to what they take and a little more: a lie about sizes must not take
    the machine down."""
    import raysweep.launching.launch  # noqa: F401

    bench.folder.mkdir(exist_ok=True)
    storage = bench.site.storage
    for command in ("launch", "plan", "results"):
        arguments = [command, *([] if command == "results" else [str(bench.site.space)])]
        arguments += ["--storage", str(storage)] + (["--in-process"] if command == "launch" else [])
        ending = bench.judge.run(Case(arguments), bench.folder, RUN_LIMIT_S, really=True)
        if ending.status:
            sys.exit(f"{command} of what is right: {ending.problem}\n{ending.err}")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


class Worker:
    """The process in which inputs are judged. One that dies or does not answer is replaced; that is a wrong end."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        self.answered = 0  # by the process that runs
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def errors(self) -> Path:
        """What the process, and libraries in it, say beside the answers."""
        return self.root.with_name(f"{self.root.name}-worker.txt")

    def ask(self, kind: str, number: int) -> dict[str, Any]:
        """How an input ended."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{kind} {number}\n".encode())
        limit = (RUN_LIMIT_S if kind == RUN or not self.answered else LIMIT_S) + GRACE_S
        line = process.stdout.readline() if select.select([process.stdout], [], [], limit)[0] else b""
        if line:
            self.answered += 1
            answer: dict[str, Any] = json.loads(line)
            return answer
        if not self.answered:
            sys.exit(f"no worker comes up, or its first input ends it: see {self.errors}")
        self.end()
        return {
            "number": number,
            "status": -1,
            "seconds": limit,
            "problem": "its process died or did not answer",
        }

    def _start(self) -> subprocess.Popen[bytes]:
        home = str(self.root / "home")
        environment = os.environ | dict.fromkeys(
            ("HOME", "HF_HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR"), home
        )
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--worker", "--site", str(self.root), "--seed", str(self.seed)]
        with open(self.errors, "ab") as errors:
            self._process = subprocess.Popen(
                command, 0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
            )
        return self._process

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process, self.answered = None, 0


def fuzz(worker: Worker, kinds: dict[str, Sequence[int]], runs: int) -> int:
    """All inputs, then the real runs; how many ended wrong."""
    wrong, runnable = 0, list[int]()
    for kind, numbers in kinds.items():
        counts, begin, longest = Counter[str](), time.monotonic(), 0.0
        for number in numbers:
            line = worker.ask(kind, number)
            ended = "wrong" if line.get("problem") else "valid" if line["status"] == 0 else "refused"
            counts[ended] += 1
            longest = max(longest, line["seconds"])
            runnable += [line["number"]] if line.get("runnable") else []
            if ended == "wrong":
                report("wrong", kind=kind, **line)
        wrong += counts["wrong"]
        seconds = round(time.monotonic() - begin, 1)
        report(kind, inputs=counts.total(), **counts, longest_s=longest, seconds=seconds)
        if worker.answered > MOST_ANSWERS:
            worker.end()
    if runs:
        wrong += real_runs(worker, runnable[:runs])
    return wrong


def real_runs(worker: Worker, numbers: Sequence[int]) -> int:
    """Launches of spaces that were valid; how many ended wrong."""
    counts, rows, begin = Counter[str](), Counter[str](), time.monotonic()
    for number in numbers:
        line = worker.ask(RUN, number)
        ended = "wrong" if line.get("problem") else {0: "all finished"}.get(line["status"], "some failed")
        counts[ended] += 1
        rows.update(line.get("rows", {}))
        if ended == "wrong":
            report("wrong", kind=RUN, **line)
    seconds = round(time.monotonic() - begin, 1)
    report("real runs", runs=counts.total(), **counts, rows=dict(rows), seconds=seconds)
    return counts["wrong"]


def again(root: Path, seed: int, kind: str, number: int) -> int:
    """One input once more, with what it printed; how many ended wrong."""
    bench = _bench(root, seed)
    case, ending, more = bench.one(kind, number)
    print(f"{case.arguments}\n{case.environment}\n{ending.out}\n{ending.err}")
    report(
        kind, number=number, status=ending.status, problem=ending.problem, folder=str(bench.folder), **more
    )
    return int(ending.problem is not None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*KINDS, RUN], help="inputs of one kind")
    parser.add_argument("--case", type=int, help="with --only: the input of that number")
    parser.add_argument(
        "--site", type=Path, help="keep all that is made below this folder, which is new or was made so"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.site, options.seed)
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = (options.site or Path(temporary) / "root").absolute()
        (root / "home").mkdir(parents=True, exist_ok=True)
        kinds = {kind: range(count) for kind, count in split(options.inputs).items()}
        if options.only and options.case is not None:
            os.environ |= {"HF_HUB_OFFLINE": "1", "HOME": str(root / "home")}
            sys.exit(again(root, options.seed, options.only, options.case))
        chosen = {kind: kinds[kind] for kind in kinds if options.only in (None, kind)}
        worker = Worker(root, options.seed)
        try:
            wrong = fuzz(worker, chosen, options.runs)
        finally:
            worker.end()
    report("fuzz", inputs=sum(map(len, chosen.values())), wrong=wrong, seed=options.seed)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
