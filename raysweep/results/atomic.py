"""Files that are replaced as a whole: readers see what was there or what is there now, whatever ends the process."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from raysweep.errors import StorageError
from raysweep.results.folders import TRIALS, UNITS

_TEMPORARY_SUFFIX = ".tmp"


def write_atomically(
    path: Path, content: bytes | memoryview | Callable[[BinaryIO], None], survives_crashes: bool = True
) -> None:
    """Replaces a file: readers see the old contents or the new ones, also after a crash of the machine. Its folder is
    made. Raises StorageError.

    content: or what writes it
    survives_crashes: of the machine. Else the disk is not waited for, and a file may be damaged after one; no end of a
    process damages it
    """
    temporary = path.with_name(_temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            if callable(content):
                content(stream)
            else:
                stream.write(content)
            if survives_crashes:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, path)
        if survives_crashes:
            _sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise StorageError.of(path, error) from error
    except BaseException:
        _remove(temporary)
        raise


def remove_stale_temporaries(folder: Path) -> int:
    """Removes temporary files that dead processes of this host left in a sweep; returns how many."""
    removed = 0
    for place in (folder, folder / TRIALS, folder / UNITS):
        for path in place.glob(f".*{_TEMPORARY_SUFFIX}"):
            if not _writer_lives(path.name):
                path.unlink(missing_ok=True)
                removed += 1
    return removed


def process_lives(pid: int) -> bool:
    """Whether a process of this host lives (a zombie counts as living)."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _remove(temporary: Path) -> None:
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def _temporary_name(name: str) -> str:
    return f".{name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}"


def _writer_lives(name: str) -> bool:
    """Whether the process that writes a temporary file may still live; of other hosts we cannot tell."""
    host, _, rest = name.removesuffix(_TEMPORARY_SUFFIX).rpartition(".")[0].rpartition(".")
    if not rest.isdigit():
        return False
    return not host.endswith(f".{socket.gethostname()}") or process_lives(int(rest))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
