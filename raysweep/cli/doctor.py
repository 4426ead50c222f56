"""`raysweep doctor`: a line for everything that a sweep needs of this machine and of every node, with the mend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from raysweep.cli.console import output, print_json, quiet_libraries
from raysweep.cli.numbers import count
from raysweep.cli.spaces import load_space

if TYPE_CHECKING:
    from raysweep.launching.doctor import Finding

WIDTH = 16  # of the longest name of a check, with a gap


def run_doctor(
    space: str, settings: Sequence[str], storage: str | None, address: str | None, as_json: bool
) -> int:
    """Returns 1 where something is wrong."""
    loaded = load_space(space, settings, None)
    quiet_libraries()
    from raysweep.launching.doctor import look_over

    findings: list[Finding] = []
    show = _Lines()

    def tell(finding: Finding) -> None:
        findings.append(finding)
        if not as_json:
            show(finding)

    look_over(loaded, storage, address, tell)
    faults = sum(finding.is_fault for finding in findings)
    if as_json:
        print_json([asdict(finding) | {"fault": finding.is_fault} for finding in findings])
    elif faults:
        output().print(f"\n{count(faults, 'fault')}", style="bold red")
    else:
        output().print("\nNothing is wrong.", style="green")
    return 1 if faults else 0


class _Lines:
    """Prints findings as they come, under the name of what they are about."""

    def __init__(self) -> None:
        self._about = ""

    def __call__(self, finding: Finding) -> None:
        from rich.table import Table
        from rich.text import Text

        console = output()
        if finding.about != self._about:
            console.print(Text(("\n" if self._about else "") + finding.about, style="bold"))
            self._about = finding.about
        grid = Table.grid(padding=(0, 1))
        for width in (5, WIDTH):
            grid.add_column(width=width, no_wrap=True)
        grid.add_column(overflow="fold")
        mark = Text("fault", style="bold red") if finding.is_fault else Text("ok", style="green")
        grid.add_row(mark, finding.check, Text(finding.said))
        if finding.mend is not None:
            grid.add_row("", "", Text(finding.mend, style="yellow"))
        console.print(grid)
