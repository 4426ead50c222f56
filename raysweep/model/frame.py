"""A model's own code around its blocks, run with the blocks taken out.

What a model does before its blocks (embedding, masks, rotary angles), what it hands to each of them and what
it does after them (norm, head, soft caps) so needs no knowledge of the family.
"""

# B samples, T tokens of a sample, H hidden, V vocabulary

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raysweep.errors import UsageError
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
    """Finds the surroundings by running the model on two tokens, with zeros without memory for its weights.

    Raises UsageError for a model that cannot run with its blocks taken out.
    """
    try:
        return _survey(model, tuple_output=True)
    except WRONG_RUN:  # a tuple went where the model expects a tensor
        pass
    try:
        return _survey(model, tuple_output=False)
    except WRONG_RUN as error:
        raise UsageError(
            f"{type(model).__name__} cannot be run block by block: {error}", allowed=ALLOWED_MODELS
        ) from error


def _survey(model: PreTrainedModel, tuple_output: bool) -> Surroundings:
    ghost = _without_weights(model)
    frame, head = Frame(ghost, tuple_output), ghost.get_output_embeddings()
    before: set[str] = set()
    after: set[str] = set()
    phase = before

    def note(module: nn.Module, name: str) -> None:
        phase.add(name)
        if module is head:
            raise _StopForward

    def advance(_index: int, hidden: Tensor, _arguments: BlockArguments) -> Tensor:
        nonlocal phase
        phase = after
        if not isinstance(hidden, Tensor):
            raise TypeError("the model takes what a block returns for its hidden states")
        return hidden

    for name, module in ghost.named_modules():
        if not name.startswith(f"{frame.blocks_name}.") and any(
            True for _ in module.parameters(recurse=False)
        ):
            module.register_forward_pre_hook(lambda module, _arguments, name=name: note(module, name))
    with torch.no_grad():
        frame.run(advance, input_ids=torch.zeros(1, 2, dtype=torch.int64))
    return Surroundings(frozenset(before), frozenset(after), tuple_output)


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the CPU whose parameters are zeros of the right shape without storage of their own."""
    zeros: dict[int, Any] = {
        id(parameter): nn.Parameter(
            torch.zeros((), dtype=parameter.dtype).expand(parameter.shape), requires_grad=False
        )
        for parameter in model.parameters()
    }
    ghost = copy.deepcopy(model, memo=zeros)
    nn.Module.to(ghost, "cpu")  # buffers
    return ghost
