"""Rows as a trial would write them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

START = datetime(2026, 11, 24, 12, tzinfo=UTC)


def _trial_row(number: int, **columns: Any) -> dict[str, Any]:
    return {
        "trial_id": f"{number:016x}",
        "recovery_id": f"{number + 1:016x}",
        "sweep": "a",
        "status": "finished",
        "recovery": "reconstruct",
        "criterion": "wanda",
        "sparsity": 0.6,
        "epochs": 1,
        "shuffle": True,
        "seed": 2**63 - 1,
        "perplexity": 12.5 + 0.1 * number,
        "started_at": START + timedelta(seconds=number, microseconds=123),
        **columns,
    }


def _unit_rows(count: int, **columns: Any) -> list[dict[str, Any]]:
    fixed = {"kind": "unit", "loss_before": 0.1, **columns}
    return [{"unit": f"{b}.mlp", "block": b, "loss_after": b / 3, **fixed} for b in range(count)]


@pytest.fixture
def trial_row() -> Callable[..., dict[str, Any]]:
    """trial_row(number, **columns): the row of one trial; trials start in the order of their numbers."""
    return _trial_row


@pytest.fixture
def unit_rows() -> Callable[..., list[dict[str, Any]]]:
    """unit_rows(count, **columns): the rows of the units of one trial."""
    return _unit_rows
