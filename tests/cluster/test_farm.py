"""A function for each of many arguments, on processes over a cluster: every argument has its answer, whatever ends."""

from __future__ import annotations

import os

import pytest
import ray

from raysweep.cluster.farm import Reserved, run_each
from raysweep.errors import RaysweepError, UsageError


@pytest.mark.long
def test_every_argument_has_its_answer():
    def work(argument: str) -> tuple[str, int]:
        if argument == "refused":
            raise UsageError("no", remedy="yes")
        if argument == "ended":
            os._exit(1)
        return argument.upper(), os.getpid()

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = dict(
            run_each(work, ["a", "refused", "b", "ended", "c"], Reserved(1.0), at_once=2, name="work")
        )
    finally:
        ray.shutdown()
    assert [found[name][0] for name in ("a", "b", "c")] == ["A", "B", "C"]
    assert len({found[name][1] for name in ("a", "b", "c")}) == 3  # a process of its own each
    assert isinstance(found["refused"], UsageError)
    assert found["refused"].remedy == "yes"
    assert isinstance(found["ended"], RaysweepError)
    assert "its process ended" in str(found["ended"])
