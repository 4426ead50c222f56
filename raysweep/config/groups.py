"""Reads the groups of a sweep: values, axes and draws of the fields of a trial."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from raysweep.config.calibration import CalibrationConfig
from raysweep.config.document import Document, KeyPath
from raysweep.config.expansion import Group, Sampled
from raysweep.config.field_groups import (
    MAPPING_FIELDS,
    MASK_FIELDS,
    NAME_FIELDS,
    RECOVERY_FIELDS,
    RETRAIN_DEFAULTS,
    RETRAIN_FIELDS,
)
from raysweep.config.fields import default_of, has_settled_default, takes_real_numbers
from raysweep.config.sections import SearchConfig
from raysweep.config.trial import Trial
from raysweep.config.validation import checked_value, expect_mapping, missing_key, shown, validated
from raysweep.errors import UsageError, nearest_name

SAMPLED_KINDS = ("loguniform", "uniform", "choice")


def axis_values(
    cls: type[BaseModel], name: str, data: Any, document: Document, path: KeyPath
) -> tuple[Any, ...]:
    """A scalar as one value, a list as an axis. Of a field that takes a list of names, a list of lists is an axis."""
    one_list = (
        name in NAME_FIELDS and isinstance(data, list) and not any(isinstance(item, list) for item in data)
    )
    if one_list or not isinstance(data, list):
        return (_value(cls, name, data, document, path),)
    return _listed_values(cls, name, data, document, path)


def _listed_values(
    cls: type[BaseModel], name: str, data: list[Any], document: Document, path: KeyPath
) -> tuple[Any, ...]:
    """Each item is a value, null the default where there is one; equal ones count once."""
    if not data:
        raise UsageError(f"{name} is an empty list", where=document.where(path), allowed="at least one value")
    checked = (_value(cls, name, item, document, (*path, i)) for i, item in enumerate(data))
    info = cls.model_fields[name]
    default = default_of(info) if has_settled_default(info) else None
    return tuple(dict.fromkeys(default if value is None else value for value in checked))


def _value(cls: type[BaseModel], name: str, data: Any, document: Document, path: KeyPath) -> Any:
    """One value; of a section within a group every key is checked on its own."""
    if name == "data" and isinstance(data, dict):
        return validated(CalibrationConfig, data, document, path)
    return checked_value(cls, name, data, document, path)


def read_groups(document: Document, data: Any, search: SearchConfig) -> tuple[Group, ...]:
    if not isinstance(data, list):
        allowed = "a list of groups; begin each with '- '"
        raise UsageError(f"sweep cannot be {shown(data)}", where=document.where(("sweep",)), allowed=allowed)
    if not data:
        allowed = "at least one group, such as [{recovery: none, criterion: wanda, sparsity: 0.5}]"
        raise UsageError(
            "no trial at all: sweep is an empty list", where=document.where(("sweep",)), allowed=allowed
        )
    return tuple(_group(document, group, ("sweep", index), search) for index, group in enumerate(data))


def _group(document: Document, data: Any, path: KeyPath, search: SearchConfig) -> Group:
    expect_mapping(document, data, path, list(Trial.model_fields))
    if "recovery" not in data:
        raise missing_key(Trial, "recovery", document, path)
    group: dict[str, tuple[Any, ...] | Sampled] = {}
    for name, value in data.items():
        is_value = name in ("sparsity", *MAPPING_FIELDS) and (
            isinstance(value, dict) and set(value).isdisjoint(SAMPLED_KINDS)
        )
        if isinstance(value, dict) and not is_value:
            group[name] = _sampled(name, value, document, (*path, name), search)
        else:
            group[name] = axis_values(Trial, name, value, document, (*path, name))
    _refuse_dense(group["recovery"], document, (*path, "recovery"))
    return _with_defaults(group)


def _refuse_dense(recovery: tuple[Any, ...] | Sampled, document: Document, path: KeyPath) -> None:
    values = recovery.values if isinstance(recovery, Sampled) else recovery
    if Trial.DENSE in values:
        raise UsageError(
            "recovery cannot be 'dense': every sweep has a row of the dense model anyway",
            where=document.where(path),
            allowed="none | reconstruct | retrain",
        )


def _with_defaults(group: dict[str, tuple[Any, ...] | Sampled]) -> Group:
    """Fills in what a stored space should show; the seed stays open, as calibration sets have their own."""
    recovery = group["recovery"]
    values = recovery.values if isinstance(recovery, Sampled) else recovery
    names = [*MASK_FIELDS]
    names += RECOVERY_FIELDS if "reconstruct" in values else ()
    names += RETRAIN_FIELDS if "retrain" in values else ()
    if "retrain" in values and len(values) > 1:  # then some defaults depend on the recovery
        names = [name for name in names if name not in RETRAIN_DEFAULTS]
    own = RETRAIN_DEFAULTS if values == ("retrain",) else {}
    infos = {name: Trial.model_fields[name] for name in dict.fromkeys(names) if name not in group}
    return group | {
        name: (own.get(name, default_of(info)),) for name, info in infos.items() if has_settled_default(info)
    }


def _sampled(
    name: str, data: dict[str, Any], document: Document, path: KeyPath, search: SearchConfig
) -> Sampled:
    where, info = document.where(path), Trial.model_fields[name]
    kinds = SAMPLED_KINDS if takes_real_numbers(info.annotation) else ("choice",)
    shape = ", ".join("{choice: [...]}" if kind == "choice" else f"{{{kind}: [low, high]}}" for kind in kinds)
    if len(data) != 1 or next(iter(data)) not in kinds:
        raise UsageError(
            f"{name} cannot be {shown(data)}",
            where=where,
            allowed=f"a value, a list, or {shape}",
            nearest=nearest_name(next(iter(data)), list(kinds)) if len(data) == 1 else None,
        )
    if search.algorithm == "grid":
        raise UsageError(
            f"{name} is drawn, but search.algorithm is 'grid'",
            where=where,
            allowed="a value or a list",
            remedy="set search.algorithm: random or optuna, and search.num_samples",
        )
    kind, values = next(iter(data.items()))
    if not isinstance(values, list):
        raise UsageError(
            f"{kind} cannot be {shown(values)}", where=document.where((*path, kind)), allowed=shape
        )
    place = (*path, kind)
    if kind == "choice":
        return Sampled(kind, _listed_values(Trial, name, values, document, place))
    checked = tuple(
        checked_value(Trial, name, value, document, (*place, i)) for i, value in enumerate(values)
    )
    _check_interval(kind, checked, len(values), document.where(place))
    return Sampled(kind, checked)


def _check_interval(kind: str, bounds: tuple[Any, ...], given: int, where: str | None) -> None:
    numbers = given == len(bounds) == 2 and all(isinstance(bound, int | float) for bound in bounds)
    ordered = numbers and bounds[0] < bounds[1]
    if not ordered or (kind == "loguniform" and bounds[0] <= 0):
        above = " and above 0" if kind == "loguniform" else ""
        allowed = f"[low, high] with low below high{above}"
        raise UsageError(f"{kind} cannot be {list(bounds)}", where=where, allowed=allowed)
