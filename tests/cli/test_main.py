"""Help, versions and slips of the pen: at once, without heavy libraries, with the nearest command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysweep import __version__
from raysweep.cli.main import app
from raysweep.errors import NumericalError
from raysweep.results.cleaning import clean
from tests.analysis.rows import START, quickstart_rows, row, write_sweep

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("evaluate", "launch", "plan", "status", "results", "report", "export")
HEAVY = ("torch", "transformers", "datasets", "ray")


def imported_by(*arguments: str) -> set[str]:
    """The heavy libraries that a fresh process has loaded when the command ends."""
    code = f"""
import sys
sys.argv = ["raysweep", *sys.argv[1:]]
from raysweep.cli.main import main
try:
    main()
finally:
    print(*[name for name in {(*HEAVY, "pandas", "pydantic", "rich")!r} if name in sys.modules], file=sys.stderr)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return set(run.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["launch", "--help"], ["--version"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments):
    assert imported_by(*arguments) <= ({"pydantic"} if "launch" in arguments else set())


@pytest.mark.parametrize("arguments", [[], ["--sort", "perplexity"], ["--json"], ["--csv"]], ids=" ".join)
@pytest.mark.parametrize("cleaned", [False, True])
def test_the_table_of_a_sweep_needs_no_pandas(tmp_path, arguments, cleaned):
    """Its import takes longer than all the rest; only the expressions of --where and the front are pandas' work."""
    folder = write_sweep(tmp_path / "a", quickstart_rows())
    if cleaned:
        clean(folder)
        write_sweep(folder, [row(50)])
    theirs = {"trial_id": f"{60:016x}", "status": "finished", "carbon": 1, "started_at": START}
    pq.write_table(pa.Table.from_pylist([theirs]), folder / "trials" / f"{60:016x}.parquet")
    here = ("results", "--storage", str(tmp_path))
    assert not imported_by(*here, *arguments) & {*HEAVY, "pandas"}
    assert "pandas" in imported_by(*here, "--where", "sparsity > 0", *arguments)


def test_no_summary_of_a_command_is_cut(raysweep):
    listed = raysweep("--help").out.split("Commands:")[1]
    assert {line.split()[0] for line in listed.splitlines() if line.startswith("  ")} >= set(COMMANDS)
    assert "..." not in listed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(raysweep, command):
    ran = raysweep(command, "--help")
    assert ran.status == 0
    documented = [one for one in app.registered_commands if one.callback and one.callback.__name__ == command]
    assert documented[0].callback.__doc__.split("\n")[0].split(":")[0] in ran.out.replace("\n", "")


def test_the_version(raysweep):
    assert raysweep("--version").out == f"raysweep {__version__}\n"


def test_an_unknown_command_is_refused_with_the_nearest(raysweep):
    ran = raysweep("lunch")
    assert ran.status == 2
    assert "launch" in ran.err


def test_an_unknown_option_is_refused(raysweep):
    ran = raysweep("results", "--sorted", "x")
    assert ran.status == 2
    assert "--sort" in ran.err


def _raising(error: BaseException):
    def run(*_: object) -> None:
        raise error

    return run


def test_an_error_that_has_a_name_is_one_message(raysweep, monkeypatch):
    monkeypatch.setattr("raysweep.cli.status.run_status", _raising(NumericalError("a is [bold]nan[/bold]")))
    ran = raysweep("status")
    assert (ran.status, ran.err) == (1, "error: a is [bold]nan[/bold]\n")


def test_an_error_that_nobody_foresaw_is_short_unless_its_traceback_is_asked_for(raysweep, monkeypatch):
    monkeypatch.setattr("raysweep.cli.status.run_status", _raising(ZeroDivisionError("by zero\nmore")))
    ran = raysweep("status")
    assert ran.status == 1
    assert ran.err.startswith("error: ZeroDivisionError: by zero\n")
    assert "--debug" in ran.err
    assert "Traceback" not in ran.err
    monkeypatch.setenv("RAYSWEEP_DEBUG", "1")
    ran = raysweep("status")
    assert ran.status == 1
    assert "Traceback" in ran.err


def test_control_c_ends_any_command_with_130(raysweep, monkeypatch):
    monkeypatch.setattr("raysweep.cli.status.run_status", _raising(KeyboardInterrupt()))
    ran = raysweep("status")
    assert ran.status == 130
    assert "Traceback" not in ran.err
