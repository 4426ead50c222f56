"""What can be the name of a model or a data set on Hugging Face."""

from __future__ import annotations

import re

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    """Whether `name` is spelled as one: NAME, or OWNER/NAME."""
    return _HUB_ID.fullmatch(name) is not None
