"""A contiguous range of a model's blocks that can run: embedding before them, head after them, where it owns these.

The model's own code runs around the blocks, with the blocks taken out: what it does before them (embedding, masks,
rotary angles) and after them (norm, head, soft caps) needs no knowledge of the family.
"""

# B samples, T tokens of a sample, H hidden, V vocabulary

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raysweep.errors import UsageError
from raysweep.model.loading import (
    Checkpoint,
    ModelSource,
    build_skeleton,
    materialize,
    resolve_dtype,
    tensor_names,
)
from raysweep.model.structure import Block, BlockArguments, block_linears, find_blocks


class _StopForward(Exception):
    """Leaves the model's forward once the wanted value has been seen."""


class _Station(nn.Module):
    """Stands where a block was: hands what arrives to `visit`, which returns the hidden states to pass on.

    Attributes that the model reads off its blocks (a layer type, say) are those of the block.
    """

    def __init__(self, block: nn.Module, index: int, tuple_output: bool) -> None:
        super().__init__()
        self.__dict__["block"] = block  # no submodule: the station holds no weights
        self.index, self.tuple_output = index, tuple_output
        self.visit: Callable[[int, Tensor, BlockArguments], Tensor] | None = None

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        if not arguments:
            arguments = (keywords.pop("hidden_states"),)
        hidden = arguments[0]
        if self.visit is not None:
            hidden = self.visit(self.index, hidden, (arguments[1:], keywords))
        return (hidden,) if self.tuple_output else hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


class ModelShard:
    """Blocks `start` to `stop` of a model, loaded alone; the first shard also embeds, the last also has the head.

    Everything is in evaluation mode and without gradients until a caller asks for them.
    """

    def __init__(self, model: nn.Module, start: int, stop: int, around: Surroundings) -> None:
        self.model = model
        self.name, modules = find_blocks(model)
        self.blocks_in_model = len(modules)
        self.start, self.stop = start, stop
        self.hidden_size: int = model.config.get_text_config().hidden_size  # type: ignore[operator, union-attr]
        self.around = around
        self._stations = [
            _Station(module, index, around.tuple_output) for index, module in enumerate(modules)
        ]
        self._originals = modules
        self._arguments: dict[tuple[int, int], list[BlockArguments]] = {}
        self.blocks = [
            Block(module, f"{self.name}.{index}", index, self.hidden_size, self._arguments_of(index))
            for index, module in enumerate(modules)
            if start <= index < stop
        ]
        self.bytes_read = 0

    @classmethod
    def load(
        cls,
        source: ModelSource,
        start: int = 0,
        stop: int | None = None,
        dtype: str = "auto",
        device: torch.device | str = "cpu",
    ) -> ModelShard:
        """Reads only the tensors of blocks `start` to `stop`, plus the embedding or the head where it owns them."""
        device = torch.device(device)
        config, checkpoint = source.load_config(), Checkpoint.open(source)
        model = build_skeleton(source, config, resolve_dtype(dtype, config, device))
        name, modules = find_blocks(model)
        stop = len(modules) if stop is None else stop
        for index in range(start, stop):
            block_linears(
                modules[index], f"{name}.{index}"
            )  # refuses what cannot be pruned before anything is read
        around = survey(model)
        owned = _owned(model, around, start, stop)
        names = {own: stored for own, stored in tensor_names(model, checkpoint).items() if own in owned}
        materialize(model, names, checkpoint, device)
        _fill_the_rest(model, name, device)
        shard = cls(model, start, stop, around)
        shard.bytes_read = checkpoint.bytes_read
        return shard

    @property
    def device(self) -> torch.device:
        return next(self.blocks[0].module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.blocks[0].module.parameters()).dtype

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.stop == self.blocks_in_model

    @torch.no_grad()
    def embed(self, ids_BT: Tensor) -> Tensor:
        """What the model hands to its first block, (B, T, H). Only on the first shard."""
        caught: list[Tensor] = []

        def stop(_index: int, hidden: Tensor, _arguments: BlockArguments) -> Tensor:
            caught.append(hidden)
            raise _StopForward

        self._run(stop, input_ids=ids_BT.to(self.device))
        return caught[0]

    @torch.no_grad()
    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """What the model makes of the last block's output, (B, T, V). Only on the last shard."""
        last = self.blocks_in_model - 1

        def inject(index: int, hidden: Tensor, _arguments: BlockArguments) -> Tensor:
            return hidden_BTH if index == last else hidden

        logits: Tensor = self._run(inject, inputs_embeds=torch.zeros_like(hidden_BTH)).logits
        return logits

    def _arguments_of(self, index: int) -> Callable[[int, int], BlockArguments]:
        def arguments(samples: int, tokens: int) -> BlockArguments:
            key = (samples, tokens)
            if key not in self._arguments:
                self._arguments[key] = self._capture_arguments(samples, tokens)
            return self._arguments[key][index]

        return arguments

    @torch.no_grad()
    def _capture_arguments(self, samples: int, tokens: int) -> list[BlockArguments]:
        """What every block takes besides hidden states: without padding this depends on the shape alone."""
        seen: list[BlockArguments] = []

        def record(index: int, hidden: Tensor, arguments: BlockArguments) -> Tensor:
            seen.append(arguments)
            if index == self.blocks_in_model - 1:
                raise _StopForward
            return hidden

        zeros = torch.zeros(samples, tokens, self.hidden_size, dtype=self.dtype, device=self.device)
        self._run(record, inputs_embeds=zeros)
        return seen

    def _run(self, visit: Callable[[int, Tensor, BlockArguments], Tensor], **inputs: Tensor) -> Any:
        """The model's own forward with `visit` in place of every block. The blocks are back afterwards."""
        owner_name, _, attribute = self.name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        for station in self._stations:
            station.visit = visit
        setattr(owner, attribute, nn.ModuleList(self._stations))
        try:
            return self.model(**inputs, use_cache=False)
        except _StopForward:
            return None
        finally:
            setattr(owner, attribute, self._originals)


def _owned(model: nn.Module, around: Surroundings, start: int, stop: int) -> set[str]:
    """Names of the tensors that the shard reads: its blocks', and outside them what its place in the chain needs."""
    blocks_name, modules = find_blocks(model)
    mine = {f"{blocks_name}.{index}." for index in range(start, stop)}
    owned = set()
    for name in model.state_dict(keep_vars=True):
        in_blocks = name.startswith(f"{blocks_name}.")
        module = name.rpartition(".")[0]
        if in_blocks:
            wanted = any(name.startswith(prefix) for prefix in mine)
        else:
            wanted = (start == 0 and module in around.before) or (
                stop == len(modules) and module in around.after
            )
        if wanted:
            owned.add(name)
    return owned


@dataclass(frozen=True)
class Surroundings:
    """What a model runs around its blocks: names of modules with tensors before and after them, up to the head.

    tuple_output: the model expects its blocks to return a tuple with the hidden states first.
    """

    before: frozenset[str]
    after: frozenset[str]
    tuple_output: bool


def survey(model: nn.Module) -> Surroundings:
    """Finds the surroundings by running the model on two tokens, with zeros that take no memory for its weights."""
    try:
        return _survey(model, tuple_output=True)
    except (AttributeError, TypeError, RuntimeError):  # a tuple went where the model expects a tensor
        return _survey(model, tuple_output=False)


def _survey(model: nn.Module, tuple_output: bool) -> Surroundings:
    ghost = _without_weights(model)
    blocks_name, _ = find_blocks(ghost)
    head = ghost.get_output_embeddings()  # type: ignore[operator]
    seen: tuple[set[str], set[str]] = (set(), set())
    phase = 0

    def note(module: nn.Module, name: str) -> None:
        seen[phase].add(name)
        if module is head:
            raise _StopForward

    def advance(_index: int, hidden: Tensor, _arguments: BlockArguments) -> Tensor:
        nonlocal phase
        phase = 1
        if not isinstance(hidden, Tensor):
            raise TypeError("the model takes what a block returns for its hidden states")
        return hidden

    for name, module in ghost.named_modules():
        if not name.startswith(f"{blocks_name}.") and _has_own_tensors(module):
            module.register_forward_pre_hook(lambda module, _arguments, name=name: note(module, name))
    shard = ModelShard(ghost, 0, 0, Surroundings(frozenset(), frozenset(), tuple_output))
    with torch.no_grad():
        shard._run(advance, input_ids=torch.zeros(1, 2, dtype=torch.int64))
    return Surroundings(frozenset(seen[0]), frozenset(seen[1]), tuple_output)


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters are zeros of the right shape without storage of their own."""
    zeros = {
        id(parameter): nn.Parameter(
            torch.zeros((), dtype=parameter.dtype).expand(parameter.shape), requires_grad=False
        )
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo=dict(zeros)).to("cpu")


def _has_own_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _fill_the_rest(model: nn.Module, blocks_name: str, device: torch.device) -> None:
    """Zeros for small tensors outside the blocks that run but belong to other shards.

    Foreign blocks and foreign vocabulary matrices stay without storage: nothing here runs them.
    """
    vocabulary = _vocabulary_modules(model)
    for name, module in model.named_modules():
        foreign = _has_own_tensors(module) and all(
            tensor.is_meta for tensor in module.parameters(recurse=False)
        )
        if foreign and not name.startswith(f"{blocks_name}.") and module not in vocabulary:
            for leaf, old in list(module.named_parameters(recurse=False)):
                zeros = torch.zeros(old.shape, dtype=old.dtype, device=device)
                setattr(module, leaf, nn.Parameter(zeros, requires_grad=False))
        for leaf, buffer in module.named_buffers(recurse=False):
            setattr(module, leaf, buffer.to(device))


def _vocabulary_modules(model: nn.Module) -> list[Any]:
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    return [module for module in modules if module is not None]
