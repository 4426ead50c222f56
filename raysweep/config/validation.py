"""Checks plain data against the settings and turns every fault into one UsageError with place and remedy."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from raysweep.config.document import Document, KeyPath, from_data
from raysweep.config.fields import NAME_VALUES, Name, allowed_values, nearest_field
from raysweep.errors import UsageError, nearest_name

M = TypeVar("M", bound=BaseModel)

_KINDS = {bool: "true or false", str: "text", list: "a list", dict: "a mapping"}


def shown(value: Any) -> str:
    """A value as it would be written in YAML, shortened, with its kind unless it is a number."""
    if value is None:
        return "null"
    if type(value) in (int, float):
        return _shortened(value)
    text = str(value).lower() if isinstance(value, bool) else _shortened(value)
    kind = _KINDS.get(type(value), type(value).__name__)
    return f"{text} ({kind})"


def _shortened(value: Any) -> str:
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = 60
    return shortener.repr(value)


def expect_mapping(document: Document, data: Any, path: KeyPath, known: list[str]) -> dict[str, Any]:
    """`data` as a mapping whose keys are all known; else a UsageError."""
    if not isinstance(data, dict):
        what = (
            f"{shown(data)} stands where keys are expected" if data is not None else "nothing is given here"
        )
        raise UsageError(what, where=document.where(path), allowed=f"keys: {', '.join(known)}")
    for key in data:
        if key not in known:
            raise UsageError(
                f"unknown key {key!r}",
                where=document.where((*path, key)),
                allowed=", ".join(known),
                nearest=nearest_field(str(key), known),
            )
    return data


def validated(
    cls: type[M], data: Mapping[str, Any], document: Document | None = None, path: KeyPath = ()
) -> M:
    """An instance of `cls` of plain data, or one UsageError that names place, value and what is allowed."""
    document = from_data(data) if document is None else document
    expect_mapping(document, data, path, list(cls.model_fields))
    values = {name: _checked(cls, name, value, document, (*path, name)) for name, value in data.items()}
    for name, info in cls.model_fields.items():
        if info.is_required() and name not in data:
            raise missing_key(cls, name, document, path)
    return assembled(cls, values, document, path)


def assembled(cls: type[M], values: Mapping[str, Any], document: Document, path: KeyPath) -> M:
    """An instance of `cls` of values that were checked one by one: only their combination can be wrong."""
    try:
        return cls.model_validate(dict(values))
    except UsageError as error:
        raise relocated(error, document, path) from None


def checked_value(cls: type[BaseModel], name: str, value: Any, document: Document, path: KeyPath) -> Any:
    """One value of the field `name` of `cls`, checked and converted to the field's type."""
    return _checked(cls, name, value, document, path)


def missing_key(cls: type[BaseModel], name: str, document: Document, path: KeyPath) -> UsageError:
    info = cls.model_fields[name]
    return UsageError(
        f"key {name!r} is missing ({info.description})",
        where=document.where((*path, name)),
        allowed=allowed_values(info),
    )


def relocated(error: UsageError, document: Document, path: KeyPath) -> UsageError:
    """An error of one setting (its `where` is the field, or `field.key` within it), with its place in the document."""
    place: KeyPath = (*path, *error.where.split(".")) if error.where else path
    return error.at(document.where(place))


def check_name(text: Any, where: str | None = None) -> str:
    """A name that is safe as the name of a folder or column, or a UsageError."""
    try:
        return _name_adapter().validate_python(text)
    except ValidationError:
        raise UsageError(f"{shown(text)} is no name", where=where, allowed=NAME_VALUES) from None


def _checked(cls: type[BaseModel], name: str, value: Any, document: Document, path: KeyPath) -> Any:
    info = cls.model_fields[name]
    try:
        return _adapter(cls, name).validate_python(value)
    except UsageError as error:
        raise error.at(document.where(path)) from None
    except ValidationError:
        allowed = allowed_values(info)
        nearest = nearest_name(value, allowed.split(" | ")) if isinstance(value, str) else None
        raise UsageError(
            f"{name} cannot be {shown(value)}",
            where=document.where(path),
            allowed=allowed,
            nearest=nearest,
            remedy=_remedy(info.annotation, value, allowed),
        ) from None


def _remedy(annotation: Any, value: Any, allowed: str) -> str | None:
    if isinstance(value, int | float) and 1 < value < 100 and allowed.startswith("a number from 0 to"):
        return f"write {value} % as {value / 100:g}"
    if isinstance(value, bool | int | float) and (annotation is str or str in get_args(annotation)):
        return "write text that looks like a number in quotes"
    return None


@cache
def _adapter(cls: type[BaseModel], name: str) -> TypeAdapter[Any]:
    info = cls.model_fields[name]
    annotation: Any = info.annotation
    annotated: Any = Annotated[(annotation, *info.metadata)] if info.metadata else annotation
    return TypeAdapter(annotated, config=ConfigDict(strict=True, allow_inf_nan=False))


@cache
def _name_adapter() -> TypeAdapter[str]:
    return TypeAdapter(Name, config=ConfigDict(strict=True))
