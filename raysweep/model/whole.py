"""A whole model in memory, as transformers has it: read by our own loader, perhaps with a trial's weights in place."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raysweep.errors import RaysweepError
from raysweep.model.block_files import read_block
from raysweep.model.checkpoint import ModelSource
from raysweep.model.linears import find_blocks
from raysweep.model.shard import ModelShard
from raysweep.results.folders import OUTSIDE, block_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")


def load_whole(
    source: ModelSource,
    dtype: str = "auto",
    device: torch.device | str = CPU,
    weights: Path | None = None,
) -> PreTrainedModel:
    """The model with all its weights, in evaluation mode; it generates as its folder says.

    weights: a folder with the weights of a trial by block, as shards write them, which take the place of its own
    Raises UsageError as `ModelShard.load` does, RaysweepError for weights that cannot be read.
    """
    model = ModelShard.load(source, dtype=dtype, device=device).model
    model.tie_weights()
    from transformers import GenerationConfig

    with suppress(OSError, ValueError):  # many models come without; then config.json says it
        model.generation_config = GenerationConfig.from_pretrained(
            source.location, revision=source.revision or "main"
        )
    if weights is not None:
        put_weights(model, weights)
    return model


@torch.no_grad()
def put_weights(model: PreTrainedModel, folder: Path) -> None:
    """Gives a model the weights of a trial, from the files of its blocks, which hold masks as well.

    Raises RaysweepError when a block's file is missing or damaged, or a tensor has another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    files: list[int | str] = list(range(len(find_blocks(model)[1])))
    if block_file(folder, OUTSIDE).exists():
        files.append(OUTSIDE)
    for block in files:
        for name, tensor in read_block(folder, block).items():
            if name in parameters:
                _copy(name, parameters[name], tensor)


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """The model over all GPUs that this process sees, layer after layer, as lm-eval's own model does it with
    `parallelize`: for those that do not fit on one."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = model._no_split_modules
    memory = get_balanced_memory(model, no_split_module_classes=whole)
    places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    found: PreTrainedModel = dispatch_model(model, places)
    return found


def _copy(name: str, parameter: Tensor, tensor: Tensor) -> None:
    if parameter.shape != tensor.shape:
        stored, own = tuple(tensor.shape), tuple(parameter.shape)
        raise RaysweepError(f"the weights of {name} have shape {stored}, and the model's {own}")
    parameter.copy_(tensor)
