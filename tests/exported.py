"""Exported folders as others see them: by plain transformers and safetensors, without raysweep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the model's files, by key."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != "masks.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@torch.no_grad()
def plain_perplexity(folder: Path, ids: object) -> float:
    """Of the whole model in float32, window by window."""
    tokens = torch.from_numpy(np.array(ids))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = torch.cat([model(window[None]).logits for window in tokens])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())
    return float(loss.exp())


def check_zeros(folder: Path) -> int:
    """Asserts that weights are zero exactly where masks are, as the loaded model has them; returns how many are."""
    masks = load_file(folder / "masks.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    zeros = 0
    for name, mask in masks.items():
        if mask.dtype == torch.uint8:
            weight = model.get_submodule(name).weight
            assert torch.equal(weight != 0, mask.bool()), name
            zeros += int((mask == 0).sum())
    return zeros
