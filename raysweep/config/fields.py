"""Types and helpers that the settings share: how a field is described, and which values it takes."""

from __future__ import annotations

import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from raysweep.config.limits import MAX_COUNT, MAX_SEED
from raysweep.errors import nearest_name

# A model's validator is built when the model is first used: reading results needs few of them.
FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
NAME_LENGTH = 100  # well below the 255 bytes of a file name, with room for prefixes and suffixes
NAME_VALUES = "letters, digits, '.', '_' and '-', beginning with a letter or a digit, at most 100 characters"

_EXPONENT_TEXT = re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


def read_exponent(value: object) -> object:
    """Numbers such as 1e-3, which YAML 1.1 readers hand over as text, become floats."""
    if isinstance(value, str) and _EXPONENT_TEXT.match(value):
        return float(value)
    return value


def as_tuple(value: object) -> object:
    """YAML lists become tuples, because frozen settings are hashable."""
    return tuple(value) if isinstance(value, list) else value


Number = Annotated[float, BeforeValidator(read_exponent)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=4096)]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=NAME_LENGTH)]


def setting(
    description: str,
    *,
    default: Any = PydanticUndefined,
    settled: Any = PydanticUndefined,
    values: str | None = None,
    shown_default: str | None = None,
) -> Any:
    """A described field.

    default: as in pydantic; without one the field is required.
    settled: the default of a field that is null where it cannot matter (see `Trial`).
    values: what is allowed, in words; left out where the type says it (choices, true or false).
    shown_default: the default in words, where it is not a constant.
    """
    extra: dict[str, Any] = {}
    if settled is not PydanticUndefined:
        default, extra["settled"] = None, settled
    if values is not None:
        extra["values"] = values
    if shown_default is not None:
        extra["shown_default"] = shown_default
    return Field(default=default, description=description, json_schema_extra=extra)


def field_info(cls: type[BaseModel], name: str) -> FieldInfo:
    return cls.model_fields[name]


def extra_of(info: FieldInfo) -> dict[str, Any]:
    """What `setting` recorded beside pydantic's own fields."""
    return info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}


def allowed_values(info: FieldInfo) -> str:
    """What a field takes, in words: for error messages and for the reference."""
    words = extra_of(info).get("values")
    return words if isinstance(words, str) else " | ".join(_choices(info.annotation))


def is_required(info: FieldInfo) -> bool:
    return info.is_required()


def default_of(info: FieldInfo) -> Any:
    """The value that a field has where it matters and is not given (None: none, or required)."""
    extra = extra_of(info)
    if "settled" in extra:
        return extra["settled"]
    return None if info.is_required() else info.get_default(call_default_factory=True)


def has_settled_default(info: FieldInfo) -> bool:
    return "settled" in extra_of(info)


def takes_real_numbers(annotation: Any) -> bool:
    """Whether a field takes any number of an interval, so that it can be drawn from one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return takes_real_numbers(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return any(takes_real_numbers(part) for part in get_args(annotation))
    return annotation is float


def _choices(annotation: Any) -> list[str]:
    origin = get_origin(annotation)
    if origin is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if origin is Annotated:
        return _choices(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [word for part in get_args(annotation) if part is not NoneType for word in _choices(part)]
    words = {bool: ["true", "false"], str: ["text"], int: ["a whole number"], float: ["a number"]}
    return words.get(annotation, ["a value"])


ABBREVIATIONS = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "seq_len": "sequence_length",
    "nsamples": "num_samples",
    "samples": "num_samples",
}
"""What people call fields elsewhere, and no spelling is close to."""


def nearest_field(name: str, known: list[str]) -> str | None:
    """The known field that is meant, or None when nothing is close."""
    meant = ABBREVIATIONS.get(name)
    return meant if meant in known else nearest_name(name, known)
