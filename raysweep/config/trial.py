"""One trial: a mask and what happens after it. What cannot matter is null, so equal trials are equal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from raysweep.config.calibration import CalibrationConfig
from raysweep.config.criterion import CRITERION_VALUES, check_criterion
from raysweep.config.field_groups import JSON_FIELDS, MASK_FIELDS
from raysweep.config.fields import (
    FROZEN,
    Count,
    Number,
    Seed,
    default_of,
    has_settled_default,
    setting,
)
from raysweep.config.names import PATTERN_WORDS, check_name_pattern
from raysweep.config.settling import mask_fields, recovery_fields, retrain_fields, settled_seed
from raysweep.config.spellings import (
    GRANULARITY_VALUES,
    PATTERN_VALUES,
    UNSTRUCTURED,
    canonical_granularity,
    canonical_pattern,
    parse_pattern,
)

SPARSITY_VALUES = "a number from 0 to below 1, or a mapping from names of linears to such numbers"


def _pairs(value: object) -> object:
    """A mapping from names to sparsities as pairs, because settings are hashable; their order matters."""
    return tuple(value.items()) if isinstance(value, dict) else value


def _settings(value: object) -> object:
    """A mapping of settings as pairs in the order of their names."""
    if not isinstance(value, dict):
        return value
    return tuple(sorted(value.items(), key=lambda pair: str(pair[0])))  # keys are checked later


def _names(value: object) -> object:
    """One name, or a list of names."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Fraction = Annotated[Number, Field(ge=0, lt=1)]
NamePattern = Annotated[str, AfterValidator(check_name_pattern)]
SettingPairs = tuple[tuple[str, bool | int | float | str | None], ...]
SparsityByName = Annotated[tuple[tuple[NamePattern, Fraction], ...], Field(min_length=1)]
Names = Annotated[tuple[NamePattern, ...], BeforeValidator(_names), Field(min_length=1)]


class Trial(BaseModel):
    """One configuration. Settled when it is made: defaults filled in, null where a field cannot matter.

    Raises UsageError for an impossible combination; its `where` is the field at fault.
    """

    model_config = FROZEN

    recovery: Literal["none", "reconstruct", "retrain", "dense"] = setting(
        "what happens after the mask: nothing, local reconstruction of each unit, or retraining of the whole model",
        values="none | reconstruct | retrain",
    )
    criterion: Annotated[str, AfterValidator(check_criterion)] | None = setting(
        "the rule that decides which weights go; a file holds a 0/1 tensor per linear name, optionally its weights as "
        "`<linear>.weight`; a function takes (weight, statistics) and returns scores, higher is kept",
        default=None,
        values=CRITERION_VALUES,
        shown_default="required",
    )
    sparsity: Annotated[Fraction | SparsityByName, BeforeValidator(_pairs)] | None = setting(
        "fraction of zeros; removed per comparison group is exactly int(size * sparsity). Of a mapping the first "
        "name that matches counts, and what none matches stays dense. May be left out for N:M, where it is 1 - N/M",
        default=None,
        values=SPARSITY_VALUES,
        shown_default="required for unstructured",
    )
    pattern: Annotated[str, AfterValidator(canonical_pattern)] | None = setting(
        "where zeros may fall: anywhere, or N weights kept of every M consecutive inputs",
        settled=UNSTRUCTURED,
        values=PATTERN_VALUES,
    )
    comparison_group: Literal["row", "matrix"] | None = setting(
        "the weights ranked against one another: an output row, or the matrix (the literature's magnitude). "
        "Does not apply to N:M and to sparsegpt, which ranks all rows of one block of columns",
        settled="row",
    )
    statistics_stream: Literal["dense", "pruned", "recovered"] | None = setting(
        "activations that the criterion's statistics are taken from: of the dense model, behind blocks that are "
        "pruned, or behind blocks that are pruned and recovered (then the mask depends on the recovery)",
        settled="dense",
    )
    dampening: Annotated[Number, Field(ge=0, le=1)] | None = setting(
        "sparsegpt: what is added to the diagonal of the Gram matrix, as a share of its mean",
        settled=0.01,
        values="a number from 0 to 1",
    )
    column_block: Count | None = setting(
        "sparsegpt: columns among which weights are ranked", settled=128, values="a whole number from 1"
    )
    ria_power: Annotated[Number, Field(ge=0)] | None = setting(
        "ria: power of the norm of an input", settled=0.5, values="a number from 0"
    )
    targets: Names | None = setting(
        "linears that are pruned; null = all of the decoder blocks", settled=None, values=PATTERN_WORDS
    )
    ignore: Names | None = setting("linears of those that are left dense", settled=None, values=PATTERN_WORDS)
    granularity: Annotated[str, AfterValidator(canonical_granularity)] | None = setting(
        "span over which the reconstruction loss is taken; subblock = attention or MLP half of a block, "
        "window:K = K blocks, model = all blocks",
        default=None,
        values=GRANULARITY_VALUES,
        shown_default="required for reconstruct",
    )
    input_stream: Literal["dense", "pruned"] | None = setting(
        "activations that flow into a unit: of the dense model, or from predecessors that are pruned and recovered",
        settled="dense",
    )
    target_stream: Literal["dense", "pruned"] | None = setting(
        "what a unit's output is compared with: the dense model's own, or the dense unit's on the unit's pruned input",
        settled="dense",
    )
    loss: Literal["mse", "normalized_mse", "cosine", "next_token", "distillation"] | None = setting(
        "mse = mean over tokens and hidden of (y' - y)^2; normalized_mse = mean over tokens of "
        "|y' - y|^2 / (|y|^2 + 1e-6); cosine = mean over tokens of 1 - cos(y', y). Of retrain: next_token (its "
        "default), or distillation = mean over tokens of KL(dense || pruned) of the next token's distribution",
        settled="mse",
    )
    trainable: Literal["all", "blocks", "weights", "lora", "lora+norms"] | None = setting(
        "what is trained: weights, biases and norms of the unit (of retrain: the whole model); of retrain only the "
        "decoder blocks; linears' weights only; or low-rank changes of them under the mask, merged in the end, alone "
        "or with the norms",
        settled="all",
    )
    lora_rank: Count | None = setting(
        "lora: rank of a change", settled=16, values="a whole number from 1, at most a linear's smaller side"
    )
    lora_alpha: Annotated[Number, Field(gt=0)] | None = setting(
        "lora: a change counts alpha / rank times", settled=32.0, values="a number above 0"
    )
    optimizer: Literal["adamw", "sgd", "exact"] | None = setting(
        "AdamW (weight decay 0, betas 0.9 and 0.999), SGD (momentum 0.9), or the exact minimum without steps "
        "(granularity matrix, loss mse)",
        settled="adamw",
    )
    learning_rate: Annotated[Number, Field(gt=0)] | None = setting(
        "peak learning rate of recovery",
        default=None,
        values="a number above 0",
        shown_default="required for reconstruct, but with optimizer exact, and for retrain",
    )
    epochs: Count | None = setting(
        "passes over the calibration set", settled=1, values="a whole number from 1"
    )
    batch_size: Count | None = setting("sequences in one step", settled=2, values="a whole number from 1")
    shuffle: bool | None = setting(
        "a new order of the sequences each epoch, from `seed`; false = their own order", settled=True
    )
    warmup_fraction: Annotated[Number, Field(ge=0, le=1)] | None = setting(
        "share of the steps over which the learning rate rises, before it falls linearly to 0",
        settled=0.1,
        values="a number from 0 to 1",
    )
    max_grad_norm: Annotated[Number, Field(gt=0)] | None = setting(
        "gradients longer than this are shortened to it; null = no limit (of retrain: 1.0)",
        settled=None,
        values="a number above 0, or null",
    )
    start_from: Annotated[SettingPairs, BeforeValidator(_settings)] | None = setting(
        "retrain: a mapping with the recovery fields of a reconstruct trial on the same mask, whose weights retraining "
        "starts from; null = the pruned weights; an axis is a list of mappings",
        default=None,
        values="{granularity: ..., learning_rate: ..., ...}, or null",
    )
    data: CalibrationConfig | None = setting(
        "retrain: the text that it is trained on, a section like `calibration`; null = the calibration set; an axis is "
        "a list of sections",
        default=None,
        values="{dataset: ..., num_samples: ..., ...}, or null",
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = setting(
        "retrain: what DeepSpeed's ZeRO spreads over the workers: 0 nothing, 1 optimizer states, 2 also gradients, 3 "
        "also weights",
        settled=2,
        values="0 | 1 | 2 | 3",
    )
    offload: Literal["none", "cpu"] | None = setting(
        "retrain: where optimizer states are kept: on the device, or in the host's memory (ZeRO 1 to 3)",
        settled="none",
    )
    gradient_accumulation: Count | None = setting(
        "retrain: pieces into which every step's sequences are cut, one after another",
        settled=1,
        values="a whole number from 1 that divides batch_size",
    )
    gradient_checkpointing: bool | None = setting(
        "retrain: whether activations within blocks are computed again instead of kept", settled=False
    )
    seed: Seed | None = setting(
        "order of the samples, the random criterion and the start of lora; null where none of them is used",
        default=None,
        values="a whole number from 0",
        shown_default="`calibration.seed`",
    )

    DENSE: ClassVar[str] = "dense"

    @classmethod
    def dense(cls) -> Self:
        """The unpruned model, which is a row of its own."""
        return cls(recovery="dense")

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """What says something of it."""
        return ((name, value) for name, value in self if value is not None)

    @property
    def is_dense(self) -> bool:
        return self.recovery == "dense"

    @property
    def is_pruned_only(self) -> bool:
        return self.recovery == "none"

    @property
    def group_size(self) -> tuple[int, int] | None:
        """(N, M), or None when the trial is dense or unstructured."""
        return None if self.pattern is None else parse_pattern(self.pattern)

    @property
    def is_sequential(self) -> bool:
        """Whether a unit must wait for those before it, because what they became flows into it or into its mask."""
        return self.input_stream == "pruned" or self.statistics_stream == "recovered"

    @model_validator(mode="after")
    def _settle(self) -> Self:
        settled = dict.fromkeys(type(self).model_fields) | {"recovery": self.recovery}
        if self.recovery != "dense":
            settled |= mask_fields(self)
            if self.recovery == "reconstruct":
                settled |= recovery_fields(self)
            if self.recovery == "retrain":
                settled |= retrain_fields(self)
            settled["seed"] = settled_seed(self, settled)
        for name, value in settled.items():
            object.__setattr__(self, name, value)  # the instance is frozen for everybody else
        return self

    @property
    def start(self) -> Self | None:
        """The reconstruct trial that retraining starts from; None where it starts from the pruned weights."""
        return None if self.start_from is None else self.reconstruction(dict(self.start_from))

    def reconstruction(self, fields: dict[str, Any]) -> Self:
        """The reconstruct trial with the same mask and these fields of recovery."""
        mask = {name: getattr(self, name) for name in MASK_FIELDS if getattr(self, name) is not None}
        return type(self).model_validate({**mask, "seed": self.seed, **fields, "recovery": "reconstruct"})

    def identity(self) -> dict[str, Any]:
        """The fields that tell this trial from others; those at a constant default are left out.

        A field added later, with the old behavior as its default, therefore changes no identity. Changing a
        default changes what an identity means and needs a new `fingerprint.NUMERICS_VERSION`.
        """
        fields = type(self).model_fields
        return {
            name: value.model_dump() if isinstance(value, BaseModel) else value
            for name, value in self
            if value is not None
            and not (has_settled_default(fields[name]) and value == default_of(fields[name]))
        }

    def columns(self) -> dict[str, Any]:
        """The fields as plain values for a table: names and mappings as JSON, one of sparsities under
        `sparsity_by_name`."""
        columns: dict[str, Any] = dict(self)
        plain = dict(
            columns,
            data=self.data and self.data.model_dump(),
            start_from=self.start_from and dict(self.start_from),
        )
        columns |= {name: json.dumps(plain[name]) for name in JSON_FIELDS if plain[name] is not None}
        by_name = columns["sparsity"] if isinstance(columns["sparsity"], tuple) else None
        columns["sparsity_by_name"] = json.dumps(dict(by_name)) if by_name else None
        return columns | ({"sparsity": None} if by_name else {})

    @classmethod
    def from_columns(cls, columns: dict[str, Any]) -> Self:
        """The trial of a table's row, whose nulls are left out. Raises UsageError or ValueError where it is none."""
        fields = {name: columns[name] for name in cls.model_fields if columns.get(name) is not None}
        fields |= {name: json.loads(fields[name]) for name in JSON_FIELDS if name in fields}
        if columns.get("sparsity_by_name") is not None:
            fields["sparsity"] = json.loads(columns["sparsity_by_name"])
        return cls.model_validate(fields)
