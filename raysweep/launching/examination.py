"""What one machine says of itself. Sent to nodes as code, so it imports what it needs where it needs it."""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("raysweep", "torch", "transformers", "ray", "deepspeed", "numpy", "pyarrow")
SHARED_MEMORY = "/dev/shm"
TEMPORARY = "/tmp"  # where Ray leaves its own
PORTS = (6379, 8265)  # of Ray's head and of its dashboard
CACHED_S = 5.0  # that a network file system may go on saying that a new file is not there; assumption


def examine(
    models: Sequence[tuple[str, str | None, bool]],
    storage: str | None,
    marker: str,
    scratch: str | None = None,
) -> dict[str, Any]:
    """Facts about this machine, as plain values.

    models: path, revision and whether its code is trusted
    storage: a folder in which the caller has put the file `marker`; None where that says nothing
    scratch: of `execution`
    """
    return {
        "versions": {"Python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "models": [_model(*model) for model in models],
        "storage": None if storage is None else see_storage(storage, marker),
        "shared_memory": _room(SHARED_MEMORY),
        "temporary": _room(TEMPORARY),
        "scratch": _scratch(scratch),
        "memory": _memory(),
        "gpus": _gpus(),
    }


def see_storage(storage: str, marker: str) -> dict[str, Any]:
    """Whether this machine sees the caller's file in the folder, and can write there; bytes that are free."""
    folder = Path(storage)
    found: dict[str, Any] = {"seen": _seen(folder / marker), "problem": None, **_room(storage)}
    try:
        mine = folder / _mark()
        with open(mine, "xb") as stream:
            stream.write(b"\0" * 4096)
            stream.flush()
            os.fsync(stream.fileno())
        mine.unlink()
    except OSError as error:
        found["problem"] = error.strerror or str(error)
        with suppress(OSError):
            mine.unlink()
    return found


def _seen(file: Path) -> bool:
    """Network file systems remember for a few seconds that something is not there."""
    deadline = time.monotonic() + CACHED_S
    while True:
        try:
            os.listdir(file.parent)
            if file.exists():
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def clock() -> float:
    """Seconds since 1970, by this machine."""
    return time.time()


@contextmanager
def marked(folder: Path) -> Iterator[str]:
    """A file in the folder for a while, by which `see_storage` knows it. Yields its name."""
    marker = _mark()
    with suppress(OSError):  # which looking at the folder tells as well
        (folder / marker).touch()
    try:
        yield marker
    finally:
        with suppress(OSError):
            (folder / marker).unlink(missing_ok=True)


def _mark() -> str:
    """A name as `raysweep.results.atomic` gives temporary files, so that one of a killed process goes like them."""
    return f".seen.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def taken_ports() -> list[int]:
    """Of Ray's well-known ports those on which something listens here."""
    taken = []
    for port in PORTS:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                taken.append(port)
    return taken


def _version(package: str) -> str | None:
    if package == "raysweep":
        with suppress(ImportError):
            from raysweep import __version__

            return __version__
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _model(path: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What tells two copies of a model apart, as far as that can be read fast; or why it cannot be read."""
    try:
        from raysweep.model.checkpoint import CONFIG, Checkpoint, ModelSource

        source = ModelSource(path, revision, trust_remote_code)
        source.load_config()
        if not source.is_local:  # weights of a Hugging Face id are fetched by the shards that need them
            return {"problem": None, "content": None}
        checkpoint = Checkpoint.open(source)
        digest = hashlib.sha256(Path(checkpoint.path_of(CONFIG)).read_bytes())
        for name, (shape, dtype) in sorted(checkpoint.headers().items()):
            digest.update(f"{name} {shape} {dtype}\n".encode())
        for name in checkpoint.file_names():
            digest.update(f"{name} {Path(checkpoint.path_of(name)).stat().st_size}\n".encode())
        return {"problem": None, "content": digest.hexdigest()[:16]}
    except Exception as error:  # whatever is wrong with it there is the answer
        return {"problem": str(error).partition("\n")[0] or type(error).__name__, "content": None}


def _room(path: str) -> dict[str, int]:
    """Bytes of the file system that a path is, or would be, on."""
    place = Path(path)
    for parent in (place, *place.parents):
        with suppress(OSError):  # it is not there, or a mount whose server has gone
            total, _, free = shutil.disk_usage(parent)
            return {"total": total, "free": free}
    return {"total": 0, "free": 0}


def _scratch(folder: str | None) -> dict[str, Any]:
    """Where shards put what finds no room in memory."""
    place = folder or tempfile.gettempdir()
    return {"folder": os.path.abspath(place), **_room(os.path.abspath(place))}


def _memory() -> dict[str, int]:
    """Bytes of memory that this process may use: all, and what is left for new programs."""
    sizes: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            name, _, rest = line.partition(":")
            sizes[name] = int(rest.split()[0]) << 10
    limit = sizes.get("MemTotal", 0)
    with suppress(ImportError):
        from raysweep.cluster.nodes import memory_limit

        limit = min(limit, memory_limit() or limit)
    return {"total": limit, "free": min(limit, sizes.get("MemAvailable", 0))}


def _gpus() -> list[str]:
    try:
        import torch

        return [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    except (ImportError, RuntimeError):
        return []
