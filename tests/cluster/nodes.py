"""Nodes of a Ray cluster on this machine, each started by `ray start` with a home and mounts of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 1 << 20


def skip_without_namespaces() -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")


def head_environment(home: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), clean.get("PATH", "")])
    return clean | {"HOME": str(home), "PATH": path, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def node(folder: Path, home: Path, *options: str, mounts: str = "", path: str = "") -> Iterator[Path]:
    """A node in the foreground, in a namespace of its own for mounts. Yields the file with its words."""
    environment = head_environment(home) | ({"PYTHONPATH": path} if path else {})
    start = [str(Path(sys.executable).with_name("ray")), "start", "--block", *options]
    start += ["--num-cpus=1", f"--memory={2 << 30}", f"--object-store-memory={80 * MIB}"]
    script = f"set -e\n{mounts}\nexec {' '.join(start)}"
    words = folder / f"node-{len(list(folder.glob('node-*')))}.txt"
    with open(words, "w") as stream:
        process = subprocess.Popen(
            ["unshare", "-m", "-u", "bash", "-c", script],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield words
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(what: str, words: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while what not in words.read_text():
        assert time.monotonic() < deadline, words.read_text()
        time.sleep(0.2)
