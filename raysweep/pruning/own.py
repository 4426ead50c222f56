"""A user's own criterion, `module:function`: found, and known by its source."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import linecache
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from raysweep.config.criterion import function_parts
from raysweep.errors import UsageError

SOURCE = "__raysweep_source__"  # what a module was imported from
ALLOWED = "module:function, importable from the current folder or installed; (weight, statistics) -> scores"


def load_function(criterion: str) -> Callable[..., Any]:
    """The function. Imports its module, also from the current folder. Raises UsageError when there is none."""
    _, name = function_parts(criterion) or ("", "")
    function = getattr(_module(criterion), name, None)
    if not callable(function):
        raise UsageError(
            f"{criterion!r}: the module has no function {name!r}", where="criterion", allowed=ALLOWED
        )
    return function  # type: ignore[no-any-return]


def function_hash(criterion: str) -> str:
    """16 hexadecimal digits of the SHA-256 of the module's source and the function's name."""
    module, (_, name) = _module(criterion), function_parts(criterion) or ("", "")
    return hashlib.sha256(f"{name}\n{getattr(module, SOURCE)}".encode()).hexdigest()[:16]


def _module(criterion: str) -> ModuleType:
    """The module as its file is now: one that was imported before it changed is imported anew."""
    module_name, _ = function_parts(criterion) or ("", "")
    here = os.getcwd()
    if here not in sys.path and Path(here, *module_name.split(".")[:1]).with_suffix(".py").is_file():
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
        source = _source(module, criterion)
        if getattr(module, SOURCE, source) != source:
            module = importlib.reload(module)
        setattr(module, SOURCE, source)
    except UsageError:
        raise
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise UsageError(
            f"{criterion!r} cannot be imported: {type(error).__name__}: {error}",
            where="criterion",
            allowed=ALLOWED,
        ) from error
    return module


def _source(module: ModuleType, criterion: str) -> str:
    try:
        linecache.checkcache()
        return inspect.getsource(module)
    except (OSError, TypeError) as error:
        raise UsageError(
            f"{criterion!r}: the source of its module cannot be read", where="criterion", allowed=ALLOWED
        ) from error
