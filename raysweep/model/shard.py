"""A contiguous range of blocks read alone, with the embedding or the head at the ends of the chain."""

# B samples, T tokens of a sample, H hidden, V vocabulary

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from raysweep.model.checkpoint import Checkpoint, ModelSource
from raysweep.model.experts import separated
from raysweep.model.frame import Frame, Surroundings, survey
from raysweep.model.layout import Layout
from raysweep.model.linears import block_linears, find_blocks
from raysweep.model.loading import build_skeleton, layout_of, materialize, read_tensors, resolve_dtype
from raysweep.model.structure import Block, BlockArguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANDOM_NUMBERS = (1 << 20) + 7  # that are drawn, then come again: no row is another's at usual widths


class ModelShard:
    """Blocks `start` to `stop` of a model; the first shard also embeds, the last, and others on demand, have the head.

    Everything is in evaluation mode and without gradients until a caller asks for them.
    """

    def __init__(
        self, model: PreTrainedModel, start: int, stop: int, around: Surroundings, head: bool = False
    ) -> None:
        self.model, self.start, self.stop = model, start, stop
        self._checkpoint: Checkpoint | None = None
        self._waiting: Layout = {}
        self._frame = Frame(model, around.tuple_output)
        self.blocks_in_model = len(self._frame.modules)
        self.has_head = head or self.is_last
        hidden_size: int = model.config.get_text_config().hidden_size
        self.blocks = [
            Block(
                separated(self._frame.modules[index]),
                f"{self._frame.blocks_name}.{index}",
                index,
                hidden_size,
                partial(self._arguments_of, index),
            )
            for index in range(start, stop)
        ]

    @classmethod
    def load(
        cls,
        source: ModelSource,
        start: int = 0,
        stop: int | None = None,
        dtype: str = "auto",
        device: torch.device | str = "cpu",
        head: bool = False,
        waits: bool = False,
    ) -> ModelShard:
        """Reads the tensors of blocks `start` to `stop` and what the ends of the chain need, no others.

        head: whether it has the last norm and the head also where it is not the last
        waits: leaves the blocks' weights in their files, for `read_block`: until a caller puts some in their place,
            they are no numbers (NaN), so that whoever forgets to has no result
        Raises UsageError for a model that is not there, is damaged, or has blocks that cannot be pruned.
        """
        device = torch.device(device)
        config, checkpoint = source.load_config(), Checkpoint.open(source)
        model = build_skeleton(source, config, resolve_dtype(dtype, config, device))
        name, modules = find_blocks(model)
        stop = len(modules) if stop is None else stop
        for index in range(start, stop):  # refuses what cannot be pruned before anything is read
            block_linears(modules[index], f"{name}.{index}")
        around = survey(model)
        layout, owned = layout_of(model, checkpoint), _owned(model, around, start, stop, head)
        mine = {own: layout[own] for own in layout if own in owned}
        blocks = tuple(f"{name}.{index}." for index in range(start, stop))
        later = {
            own: mine.pop(own) for own in _parameters(model) & mine.keys() if waits and own.startswith(blocks)
        }
        materialize(model, mine, checkpoint, device)
        _leave_open(model, later, device)
        _fill_the_rest(model, around, device)
        shard = cls(model, start, stop, around, head)
        shard._checkpoint, shard._waiting = checkpoint, later
        return shard

    @classmethod
    def random(
        cls, source: ModelSource, start: int, stop: int, dtype: str, device: torch.device | str, head: bool
    ) -> ModelShard:
        """The same part with random numbers for weights: of the model only its configuration is read.

        To measure how long things take. Raises UsageError as `load` does.
        """
        device, config = torch.device(device), source.load_config()
        model = build_skeleton(source, config, resolve_dtype(dtype, config, device))
        around = survey(model)
        owned = _owned(model, around, start, stop, head)
        generator = torch.Generator(device).manual_seed(0)
        for path, module in model.named_modules():
            for leaf, old in list(module.named_parameters(recurse=False)):
                if (f"{path}.{leaf}" if path else leaf) in owned:
                    setattr(module, leaf, _random_like(old, device, generator))
        _fill_the_rest(model, around, device)
        return cls(model, start, stop, around, head)

    @classmethod
    def whole(cls, model: PreTrainedModel) -> ModelShard:
        """All blocks of a model that is in memory already; it shares its weights, those of fused experts as well, whose
        parts have names as if experts were apart (`experts.tensor_of`)."""
        return cls(model, 0, len(find_blocks(model)[1]), survey(model))

    @property
    def bytes_read(self) -> int:
        """Of the model's files so far."""
        return self._checkpoint.bytes_read if self._checkpoint is not None else 0

    def read_block(self, index: int, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Parameters of a block whose weights wait, on the CPU, by full name; all of them without `names`."""
        prefix = f"{self._frame.blocks_name}.{index}."
        wanted = {own: parts for own, parts in self._waiting.items() if own.startswith(prefix)}
        if names is not None:
            wanted = {own: parts for own, parts in wanted.items() if own in names}
        if self._checkpoint is None:
            raise RuntimeError("a model that was in memory already has no files to read")
        return read_tensors(self.model, wanted, self._checkpoint)

    @property
    def device(self) -> torch.device:
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return self._parameter.dtype

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.stop == self.blocks_in_model

    def embed(self, ids_BT: Tensor) -> Tensor:
        """What the model hands to its first block, (B, T, H). Only on the first shard."""
        return self._frame.embed(ids_BT.to(self.device))

    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """What the model makes of the last block's output, (B, T, V). Only on a shard with the head."""
        return self._frame.logits(hidden_BTH)

    @property
    def _parameter(self) -> nn.Parameter:
        return next(self.blocks[0].module.parameters())

    def forget_weights(self) -> None:
        """Frees them at once: models and their blocks know one another, so that Python finds them late."""
        for parameter in self.model.parameters():
            if not parameter.is_meta:
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    def _arguments_of(self, index: int, samples: int, tokens: int) -> BlockArguments:
        return self._frame.block_arguments(samples, tokens, self._parameter)[index]


def _owned(model: PreTrainedModel, around: Surroundings, start: int, stop: int, head: bool) -> set[str]:
    """Names of the tensors that the shard reads: of its blocks, and what its place in the chain needs."""
    name, modules = find_blocks(model)
    blocks = tuple(f"{name}.{index}." for index in range(start, stop))
    outside: set[str] = set()
    if start == 0:
        outside |= around.before
    if stop == len(modules) or head:
        outside |= around.after
    tensors = model.state_dict(keep_vars=True)
    return {name for name in tensors if name.startswith(blocks) or name.rpartition(".")[0] in outside}


def _parameters(model: PreTrainedModel) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _leave_open(model: PreTrainedModel, names: Iterable[str], device: torch.device) -> None:
    """Parameters of the right shape on the device that take no memory and are no numbers."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        old = owner.get_parameter(leaf)
        nothing = torch.full((1,), math.nan, dtype=old.dtype, device=device).expand(old.shape)
        setattr(owner, leaf, nn.Parameter(nothing, requires_grad=False))


def _random_like(old: nn.Parameter, device: torch.device, generator: torch.Generator) -> nn.Parameter:
    """Numbers with which activations neither vanish nor grow."""
    value = torch.empty(old.shape, dtype=old.dtype, device=device)
    if value.dim() < 2:
        value.fill_(1.0)
    else:  # drawing all of a large model's would take longer than what is measured on them
        count = min(RANDOM_NUMBERS, value.numel())
        numbers = torch.randn(count, device=device, generator=generator) * value.shape[-1] ** -0.5
        for part in value.view(-1).split(count):
            part.copy_(numbers[: len(part)])
    return nn.Parameter(value, requires_grad=False)


def _fill_the_rest(model: PreTrainedModel, around: Surroundings, device: torch.device) -> None:
    """Zeros for the small modules outside the blocks that run here but belong to other shards.

    Foreign blocks, foreign vocabulary matrices and what no text runs through (a vision tower) stay without storage.
    """
    vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
    for path, module in model.named_modules():
        runs = path in around.before | around.after and module not in vocabulary
        for leaf, old in list(module.named_parameters(recurse=False)):
            if runs and old.is_meta:
                zeros = torch.zeros(old.shape, dtype=old.dtype, device=device)
                setattr(module, leaf, nn.Parameter(zeros, requires_grad=False))
        for leaf, buffer in module.named_buffers(recurse=False):
            setattr(module, leaf, buffer.to(device))
