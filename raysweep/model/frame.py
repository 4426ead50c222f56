"""A model's own code around its blocks, run with the blocks taken out.

What a model does before its blocks (embedding, masks, rotary angles), what it hands to each of them and what
it does after them (norm, head, soft caps) so needs no knowledge of the family.
"""

# B samples, T tokens of a sample, H hidden, V vocabulary

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raysweep.errors import UsageError, first_line
from raysweep.model.linears import ALLOWED_MODELS, find_blocks
from raysweep.model.structure import BlockArguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Visit = Callable[[int, Tensor, BlockArguments], Tensor]
"""What happens in a block's place: its index, the hidden states and other arguments to what it passes on."""


# What a model's own code ends in when it is run as it cannot be.
WRONG_RUN = (AttributeError, TypeError, RuntimeError, ValueError, LookupError)


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
        self.visit: Visit | None = None

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


class Frame:
    """What a model does around its blocks. Its weights are only touched where they are needed.

    tuple_output: the model expects its blocks to return a tuple with the hidden states first.
    """

    def __init__(self, model: PreTrainedModel, tuple_output: bool) -> None:
        self.model = model
        self.blocks_name, self.modules = find_blocks(model)
        self._stations = [_Station(module, index, tuple_output) for index, module in enumerate(self.modules)]
        self._arguments: dict[tuple[int, int], list[BlockArguments]] = {}

    @torch.no_grad()
    def embed(self, ids_BT: Tensor) -> Tensor:
        """What the model hands to its first block, (B, T, H). Needs the modules before the blocks."""
        caught: list[Tensor] = []

        def stop(_index: int, hidden: Tensor, _arguments: BlockArguments) -> Tensor:
            caught.append(hidden)
            raise _StopForward

        self.run(stop, input_ids=ids_BT)
        return caught[0]

    @torch.no_grad()
    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """What the model makes of the last block's output, (B, T, V). Needs the modules after the blocks."""
        last = len(self.modules) - 1

        def inject(index: int, hidden: Tensor, _arguments: BlockArguments) -> Tensor:
            return hidden_BTH if index == last else hidden

        samples, tokens, _ = hidden_BTH.shape
        logits: Tensor = self.run(inject, inputs_embeds=self._no_words(samples, tokens, hidden_BTH)).logits
        return logits

    @torch.no_grad()
    def block_arguments(self, samples: int, tokens: int, like: Tensor) -> list[BlockArguments]:
        """By block, what it takes besides hidden states: without padding this depends on the shape alone.

        like: a tensor on the device and in the dtype of the hidden states
        """
        if (samples, tokens) not in self._arguments:
            seen: list[BlockArguments] = []

            def record(index: int, hidden: Tensor, arguments: BlockArguments) -> Tensor:
                seen.append(arguments)
                if index == len(self.modules) - 1:
                    raise _StopForward
                return hidden

            self.run(record, inputs_embeds=self._no_words(samples, tokens, like))
            self._arguments[samples, tokens] = seen
        return self._arguments[samples, tokens]

    def _no_words(self, samples: int, tokens: int, like: Tensor) -> Tensor:
        """Zeros in place of embedded words, which may be narrower than the hidden states."""
        embedding: Any = self.model.get_input_embeddings()
        return torch.zeros(samples, tokens, embedding.weight.shape[1], dtype=like.dtype, device=like.device)

    def run(self, visit: Visit, **inputs: Tensor) -> Any:
        """The model's own forward with `visit` in place of every block; None where `visit` ended it."""
        owner_name, _, attribute = self.blocks_name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        for station in self._stations:
            station.visit = visit
        setattr(owner, attribute, nn.ModuleList(self._stations))
        try:
            return self.model(**inputs, use_cache=False)
        except _StopForward:
            return None
        finally:
            setattr(owner, attribute, self.modules)


@dataclass(frozen=True)
class Surroundings:
    """Names of the modules with tensors that run before the blocks and after them, up to the head.

    tuple_output: the model expects its blocks to return a tuple with the hidden states first.
    """

    before: frozenset[str]
    after: frozenset[str]
    tuple_output: bool


def survey(model: PreTrainedModel) -> Surroundings:
    """Finds the surroundings by running the model on two tokens, with weights that take no memory.

    Raises UsageError for a model that cannot run with its blocks taken out, and for one whose blocks are no chain: that
    runs a block twice, does something between two, gives them something that depends on the text or on weights, which a
    shard has only where they lie, or passes on more than the hidden states of one stream.
    """
    try:
        return _survey(model, tuple_output=True)
    except WRONG_RUN:  # a tuple went where the model expects a tensor
        pass
    try:
        return _survey(model, tuple_output=False)
    except WRONG_RUN as error:
        raise _unchained(model, first_line(error)) from error


def _unchained(model: nn.Module, why: str) -> UsageError:
    return UsageError(f"{type(model).__name__} cannot be run block by block: {why}", allowed=ALLOWED_MODELS)


def _survey(model: PreTrainedModel, tuple_output: bool) -> Surroundings:
    ghost, other = _without_weights(model), _without_weights(model, step=3)
    frame, head = Frame(ghost, tuple_output), ghost.get_output_embeddings()
    before: set[str] = set()
    after: set[str] = set()
    passing = _Passing(frame)

    def note(module: nn.Module, name: str) -> None:
        (after if passing.seen else before).add(name)
        if module is head:
            raise _StopForward

    for name, module in ghost.named_modules():
        if not name.startswith(f"{frame.blocks_name}.") and any(
            True for _ in module.parameters(recurse=False)
        ):
            module.register_forward_pre_hook(lambda module, _arguments, name=name: note(module, name))
    with torch.no_grad():
        known = passing.run(input_ids=torch.tensor([[0, 0]]))
        surroundings = Surroundings(frozenset(before), frozenset(after), tuple_output)
        words = frame._no_words(1, 2, next(ghost.parameters()))
        for inputs in ({"input_ids": torch.tensor([[1, 2]])}, {"inputs_embeds": words}):
            for index, (these, those) in enumerate(zip(passing.run(**inputs), known, strict=True)):
                if not _alike(these, those):
                    raise _unchained(model, f"what block {index} takes depends on the text")
        others = _Passing(Frame(other, tuple_output), ends=True).run(input_ids=torch.tensor([[0, 0]]))
        for index, (these, those) in enumerate(zip(others, known, strict=True)):
            if not _alike(these, those):
                raise _unchained(model, f"what block {index} takes depends on weights outside of it")
    return surroundings


class _Passing:
    """Passes through the blocks of a frame, and refuses a way that no chain of blocks has.

    seen: arguments of the blocks that were passed, in order
    """

    def __init__(self, frame: Frame, ends: bool = False) -> None:
        """ends: behind the last block, so that nothing of the head runs"""
        self._frame, self._ends = frame, ends
        self.seen: list[BlockArguments] = []
        self._given: Tensor | None = None

    def run(self, **inputs: Tensor) -> list[BlockArguments]:
        """What every block takes besides hidden states."""
        self.seen, self._given = [], None
        self._frame.run(self._pass, **inputs)
        if len(self.seen) < len(self._frame.modules):
            raise _unchained(self._frame.model, f"it leaves block {len(self.seen)} out")
        return self.seen

    def _pass(self, index: int, hidden: Tensor, arguments: BlockArguments) -> Tensor:
        if not isinstance(hidden, Tensor):
            raise TypeError("the model takes what a block returns for its hidden states")
        width = self._frame.model.config.get_text_config().hidden_size
        if hidden.dim() != 3 or hidden.shape[-1] != width:
            sizes = " x ".join(map(str, hidden.shape[2:]))
            raise _unchained(
                self._frame.model,
                f"block {index} takes {sizes} numbers a token, where its hidden size is {width}",
            )
        if index != len(self.seen):
            raise _unchained(self._frame.model, f"it comes to block {index} after {len(self.seen)} others")
        if self._given is not None and not torch.equal(hidden, self._given):
            raise _unchained(self._frame.model, f"it changes what block {index - 1} gives to block {index}")
        self.seen.append(arguments)
        self._given = hidden + (index + 1)
        if self._ends and index == len(self._frame.modules) - 1:
            raise _StopForward
        return self._given


def _alike(one: Any, other: Any) -> bool:
    """Whether blocks can be given either: equal numbers, and of anything else the same kind."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return one == other if isinstance(one, (str, int, float)) else type(one) is type(other)


def _without_weights(model: PreTrainedModel, step: int = 1) -> PreTrainedModel:
    """A copy on the CPU whose parameters have the right shape, and one small number for each row: tokens can be told
    apart by it, and it takes no memory. step: with another one they are others"""
    rows: dict[int, Any] = {
        id(parameter): nn.Parameter(_one_number_a_row(parameter, step), requires_grad=False)
        for parameter in model.parameters()
    }
    ghost = copy.deepcopy(model, memo=rows)
    nn.Module.to(ghost, "cpu")  # buffers
    return ghost


def _one_number_a_row(parameter: Tensor, step: int) -> Tensor:
    shape = parameter.shape
    if not shape:
        return torch.tensor((step - 1) / 64, dtype=parameter.dtype)
    numbers = ((torch.arange(shape[0]) + 1) * step % 7 + 1) / 64
    return numbers.to(parameter.dtype).view(-1, *[1] * (len(shape) - 1)).expand(shape)
