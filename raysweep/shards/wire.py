"""Hidden states between shards, as arrays that Ray moves without pickling."""

# B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

AS_DENSE = "as dense"
"""Stands for hidden states that the next shard has kept from the dense pass."""

_INTEGER_VIEWS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}


def to_wire(hidden_BTH: Tensor) -> np.ndarray[Any, Any]:
    """Hidden states as an array that Ray moves without pickling; 16-bit floats as the integers of their bits."""
    hidden_BTH = hidden_BTH.detach().cpu().contiguous()
    return hidden_BTH.view(_INTEGER_VIEWS.get(hidden_BTH.dtype, hidden_BTH.dtype)).numpy()


def from_wire(array: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    """The tensor that `to_wire` sent, in storage of its own: what arrives may be read-only and oddly aligned."""
    tensor = torch.empty(array.shape, dtype=_INTEGER_VIEWS.get(dtype, dtype))
    np.copyto(tensor.numpy(), array)
    return tensor.view(dtype)
