"""What `criterion` may say: the name of a rule, masks from a file, or a function of the user's own."""

from __future__ import annotations

import re

from raysweep.errors import UsageError, nearest_name

CRITERIA = ("magnitude", "random", "wanda", "ria", "sparsegpt")
CALIBRATED_CRITERIA = ("wanda", "ria", "sparsegpt")  # those that look at activations
FILE_PREFIX = "file:"
CRITERION_VALUES = (
    "magnitude | random | wanda | ria | sparsegpt | file:MASKS.safetensors | module:function (of your own)"
)

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def check_criterion(text: str) -> str:
    """The text itself. Raises UsageError for what names no criterion."""
    if text in CRITERIA or _is_function(text) or (is_mask_file(text) and text != FILE_PREFIX):
        return text
    raise UsageError(
        f"{text!r} is no criterion",
        where="criterion",
        allowed=CRITERION_VALUES,
        nearest=nearest_name(text, list(CRITERIA)),
    )


def is_mask_file(criterion: str) -> bool:
    """Whether masks come from a file, which then says all about them."""
    return criterion.startswith(FILE_PREFIX)


def function_parts(criterion: str) -> tuple[str, str] | None:
    """Module and name of a user's function; None for any other criterion."""
    if not _is_function(criterion):
        return None
    module, _, name = criterion.partition(":")
    return module, name


def reads_statistics(criterion: str) -> bool:
    """Whether the criterion may look at activations."""
    return criterion in CALIBRATED_CRITERIA or _is_function(criterion)


def _is_function(criterion: str) -> bool:
    return not is_mask_file(criterion) and _FUNCTION.fullmatch(criterion) is not None
