"""One trial: a mask and what happens after it. What cannot matter is null, so equal trials are equal."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from raysweep.config.fields import (
    FROZEN,
    Count,
    Number,
    Seed,
    allowed_values,
    default_of,
    has_settled_default,
    setting,
)
from raysweep.errors import UsageError

UNSTRUCTURED = "unstructured"
PATTERN_VALUES = "unstructured, or N:M with 1 <= N < M (N kept of M consecutive inputs), such as 2:4"
CALIBRATED_CRITERIA = ("wanda",)  # criteria whose score looks at activations
MASK_FIELDS = ("criterion", "sparsity", "pattern", "comparison_group", "statistics_stream")
RECOVERY_FIELDS = (
    "granularity",
    "input_stream",
    "target_stream",
    "loss",
    "trainable",
    "optimizer",
    "learning_rate",
    "epochs",
    "batch_size",
    "shuffle",
    "warmup_fraction",
    "max_grad_norm",
)

_PATTERN = re.compile(r"^([0-9]{1,4}):([0-9]{1,4})$")
_SPARSITY_TOLERANCE = 1e-9  # 0.33333333333 is meant to be 1 - 2/3


def parse_pattern(text: str) -> tuple[int, int] | None:
    """(N, M) of an N:M pattern, None for unstructured. Anything else is a UsageError."""
    if text == UNSTRUCTURED:
        return None
    match = _PATTERN.match(text)
    if match is None:
        raise UsageError(f"{text!r} is no pattern", where="pattern", allowed=PATTERN_VALUES)
    kept, group = int(match[1]), int(match[2])
    if not 1 <= kept < group:
        problem = f"pattern {text!r} keeps {kept} of {group} weights"
        raise UsageError(problem, where="pattern", allowed=PATTERN_VALUES)
    return kept, group


def canonical_pattern(text: str) -> str:
    """The one spelling of a pattern ("02:4" is 2:4)."""
    parsed = parse_pattern(text)
    return UNSTRUCTURED if parsed is None else f"{parsed[0]}:{parsed[1]}"


class Trial(BaseModel):
    """One configuration. Settled when it is made: defaults filled in, null where a field cannot matter.

    Raises UsageError for an impossible combination; its `where` is the field at fault.
    """

    model_config = FROZEN

    recovery: Literal["none", "reconstruct", "dense"] = setting(
        "what happens after the mask: nothing, or local reconstruction of each unit",
        values="none | reconstruct",
    )
    criterion: Literal["magnitude", "random", "wanda"] | None = setting(
        "the rule that decides which weights go", default=None, shown_default="required"
    )
    sparsity: Annotated[Number, Field(ge=0, lt=1)] | None = setting(
        "fraction of zeros; removed per comparison group is exactly int(size * sparsity). "
        "May be left out for N:M, where it is 1 - N/M",
        default=None,
        values="a number from 0 to below 1",
        shown_default="required for unstructured",
    )
    pattern: Annotated[str, AfterValidator(canonical_pattern)] | None = setting(
        "where zeros may fall: anywhere, or N weights kept of every M consecutive inputs",
        settled=UNSTRUCTURED,
        values=PATTERN_VALUES,
    )
    comparison_group: Literal["row", "matrix"] | None = setting(
        "the weights ranked against one another: an output row, or the matrix (the literature's magnitude). "
        "Does not apply to N:M",
        settled="row",
    )
    statistics_stream: Literal["dense"] | None = setting(
        "activations that the criterion's statistics are taken from (wanda)", settled="dense"
    )
    granularity: Literal["matrix", "subblock", "block"] | None = setting(
        "span over which the reconstruction loss is taken; subblock = attention or MLP half of a block",
        default=None,
        shown_default="required for reconstruct",
    )
    input_stream: Literal["dense"] | None = setting("activations that flow into a unit", settled="dense")
    target_stream: Literal["dense"] | None = setting("what a unit's output is compared with", settled="dense")
    loss: Literal["mse"] | None = setting("mean over tokens and hidden of (y' - y)^2", settled="mse")
    trainable: Literal["all", "weights"] | None = setting(
        "what is trained: weights, biases and norms of the unit, or its prunable weights only", settled="all"
    )
    optimizer: Literal["adamw"] | None = setting(
        "AdamW, weight decay 0, betas 0.9 and 0.999", settled="adamw"
    )
    learning_rate: Annotated[Number, Field(gt=0)] | None = setting(
        "peak learning rate of reconstruction",
        default=None,
        values="a number above 0",
        shown_default="required for reconstruct",
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
        "gradients longer than this are shortened to it; null = no limit",
        settled=None,
        values="a number above 0, or null",
    )
    seed: Seed | None = setting(
        "order of the samples, and the random criterion; null where neither is used",
        default=None,
        values="a whole number from 0",
        shown_default="`calibration.seed`",
    )

    DENSE: ClassVar[str] = "dense"

    @classmethod
    def dense(cls) -> Self:
        """The unpruned model, which is a row of its own."""
        return cls(recovery="dense")

    @property
    def is_dense(self) -> bool:
        return self.recovery == "dense"

    @property
    def group_size(self) -> tuple[int, int] | None:
        """(N, M), or None when the trial is dense or unstructured."""
        return None if self.pattern is None else parse_pattern(self.pattern)

    @model_validator(mode="after")
    def _settle(self) -> Self:
        settled = dict.fromkeys(type(self).model_fields) | {"recovery": self.recovery}
        if self.recovery != "dense":
            settled |= self._mask_fields()
            if self.recovery == "reconstruct":
                settled |= self._recovery_fields()
            settled["seed"] = self._settled_seed(bool(settled["shuffle"]))
        for name, value in settled.items():
            object.__setattr__(self, name, value)  # the instance is frozen for everybody else
        return self

    def _mask_fields(self) -> dict[str, Any]:
        criterion = self._required("criterion", "recovery 'none' and 'reconstruct'")
        pattern = self._given_or_default("pattern")
        fields: dict[str, Any] = {
            "criterion": criterion,
            "pattern": pattern,
            "sparsity": self._sparsity(pattern),
        }
        if pattern == UNSTRUCTURED:
            fields["comparison_group"] = self._given_or_default("comparison_group")
        if criterion in CALIBRATED_CRITERIA:
            fields["statistics_stream"] = self._given_or_default("statistics_stream")
        return fields

    def _sparsity(self, pattern: str) -> float:
        parsed = parse_pattern(pattern)
        if parsed is None:
            return float(self._required("sparsity", "the pattern 'unstructured'")) + 0.0  # -0.0 is 0.0
        kept, group = parsed
        implied = (group - kept) / group
        if self.sparsity is not None and abs(self.sparsity - implied) > _SPARSITY_TOLERANCE:
            raise UsageError(
                f"sparsity {self.sparsity!r} contradicts pattern {pattern}",
                where="sparsity",
                allowed=f"{implied!r}, or leave it out",
                remedy="put patterns and sparsities that do not belong together into groups of their own",
            )
        return implied

    def _recovery_fields(self) -> dict[str, Any]:
        for name in ("granularity", "learning_rate"):
            self._required(name, "recovery 'reconstruct'")
        return {name: self._given_or_default(name) for name in RECOVERY_FIELDS}

    def _settled_seed(self, shuffles: bool) -> int | None:
        if self.criterion == "random" or shuffles:
            return self.seed or 0
        return None

    def _given_or_default(self, name: str) -> Any:
        given = getattr(self, name)
        return default_of(type(self).model_fields[name]) if given is None else given

    def _required(self, name: str, by: str) -> Any:
        value = getattr(self, name)
        if value is None:
            allowed = allowed_values(type(self).model_fields[name])
            raise UsageError(f"{name} is missing; {by} needs it", where=name, allowed=allowed)
        return value

    def identity(self) -> dict[str, Any]:
        """The fields that tell this trial from others; those at a constant default are left out.

        A field added later, with the old behavior as its default, therefore changes no identity. Changing a
        default changes what an identity means and needs a new `fingerprint.NUMERICS_VERSION`.
        """
        fields = type(self).model_fields
        return {
            name: value
            for name, value in self
            if value is not None
            and not (has_settled_default(fields[name]) and value == default_of(fields[name]))
        }

    def label(self) -> str:
        """A short name for people, such as `wanda/row 0.6 subblock lr=0.001` or `magnitude 2:4`."""
        if self.is_dense:
            return "dense"
        if self.comparison_group is None:
            mask = f"{self.criterion} {self.pattern}"
        else:
            mask = f"{self.criterion}/{self.comparison_group} {self.sparsity:g}"
        words = [mask]
        if self.recovery == "reconstruct":
            words += [str(self.granularity), f"lr={self.learning_rate:g}"]
        return " ".join(words + self._remarkable())

    def _remarkable(self) -> list[str]:
        """What differs from the usual, for the label."""
        shown = {"trainable", "epochs", "batch_size", "shuffle", "warmup_fraction", "max_grad_norm"}
        words = [f"{name}={_plain(value)}" for name, value in self.identity().items() if name in shown]
        return words + ([f"seed={self.seed}"] if self.seed else [])


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
