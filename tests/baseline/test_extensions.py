"""What DeepSpeed compiles: a build that was killed is no trap for those that come later."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from raysweep.baseline import extensions

pytestmark = pytest.mark.timeout(900)  # compiling takes minutes, once on a machine

LOAD = "from raysweep.baseline.extensions import load_extensions; load_extensions()"


@pytest.mark.long
def test_a_build_that_was_killed_is_begun_again(tmp_path, monkeypatch):
    """What has been compiled on this machine is used, so that this takes seconds."""
    compiled = extensions.own_folder()
    subprocess.run([sys.executable, "-c", LOAD], check=True, timeout=800)
    names = [path.name for path in compiled.iterdir() if path.is_dir()]
    assert names, "nothing is compiled on this machine, so that nothing is tested"
    monkeypatch.setenv(extensions.FOLDER_VARIABLE, str(tmp_path))
    for name in names:
        left = extensions.own_folder() / name / extensions.MARK
        left.parent.mkdir(parents=True)
        left.touch()
        for path in (compiled / name).iterdir():
            if path.name != extensions.MARK:
                os.link(path, left.parent / path.name)
    subprocess.run([sys.executable, "-c", LOAD], check=True, timeout=800)
    assert not list(extensions.own_folder().glob(f"*/{extensions.MARK}"))


def test_the_folder_is_found_again_by_processes_that_are_started_from_there(tmp_path, monkeypatch):
    monkeypatch.setenv(extensions.FOLDER_VARIABLE, str(tmp_path))
    own = extensions.own_folder()
    assert own.parent == tmp_path
    monkeypatch.setenv(extensions.FOLDER_VARIABLE, str(own))
    assert extensions.own_folder() == own
