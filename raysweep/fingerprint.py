"""Identities by content: what determines a trial's weights, and what determines its row."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from raysweep.config.trial import Trial
from raysweep.errors import RaysweepError

NUMERICS_VERSION = 1  # raised by hand when our maths changes the numbers of a trial beyond rounding
ID_LENGTH = 16  # hexadecimal digits: 64 bits, a collision among a million trials has a chance of 3e-8

_ID = re.compile(r"[0-9a-f]{16}")
_DTYPES = ("float32", "bfloat16", "float16")


def canonical_json(value: Any) -> str:
    """One text for equal values: keys sorted, no spaces, floats as `repr` writes them, -0.0 as 0.0.

    Raises RaysweepError for what has no such text: other types, keys that are no text, infinite numbers.
    """
    return json.dumps(_canonical(value, "value"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:ID_LENGTH]


def is_identity(text: object) -> bool:
    """Whether a text looks like one of our identities."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def recovery_id(
    trial: Trial,
    model_hash: str,
    dtype: str,
    calibration_hash: str | None,
    criterion_hash: str | None = None,
    data_hash: str | None = None,
) -> str:
    """Identity of a trial's weights.

    model_hash, calibration_hash: hashes of contents (weights and configuration; tokens), never of paths
    criterion_hash: of the contents of a mask file, or of the source of a user's function
    data_hash: of the tokens of `data`, where a trial is retrained on others than the calibration set
    dtype: the resolved number format, not `auto`
    The dense model has seen no calibration set: its identity leaves it out, whatever is given.
    """
    if dtype not in _DTYPES:
        raise RaysweepError(f"the dtype {dtype!r} is not resolved and cannot be part of an identity")
    content = {
        "numerics": NUMERICS_VERSION,
        "trial": trial.identity()
        | ({"criterion": criterion_hash} if criterion_hash else {})
        | ({"data": data_hash} if data_hash else {}),
        "model": _content_hash(model_hash, "model"),
        "dtype": dtype,
    }
    if not trial.is_dense:
        content["calibration"] = _content_hash(calibration_hash, "calibration set")
    return fingerprint(content)


def trial_id(recovery_id: str, protocol: Mapping[str, Any], text_hashes: Mapping[str, str]) -> str:
    """Identity of a trial's row: its weights and how they are measured.

    protocol: `SearchSpace.evaluation_protocol()`
    text_hashes: hash of the contents of each text measured on, by its name in the protocol
    """
    texts = {name: _content_hash(text_hash, f"text {name!r}") for name, text_hash in text_hashes.items()}
    return fingerprint({"recovery": recovery_id, "protocol": dict(protocol), "texts": texts})


def _content_hash(text: str | None, what: str) -> str:
    if not isinstance(text, str) or not text:
        raise RaysweepError(f"the {what} has no hash of its contents, so its trials cannot be told apart")
    return text


def _canonical(value: Any, place: str) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RaysweepError(f"{place} is {value}, which cannot be part of an identity")
        return float(value) + 0.0
    if isinstance(value, list | tuple):
        return [_canonical(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _canonical(item, f"{place}.{key}") for key, item in value.items()}
    raise RaysweepError(f"{place} is of type {type(value).__name__}, which cannot be part of an identity")
