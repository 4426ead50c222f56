"""Storages that a URI names (s3://bucket/prefix): their mirrors, the local folders that everything works on."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from raysweep.errors import UsageError, nearest_name
from raysweep.fingerprint import fingerprint

CACHE_VARIABLE = "RAYSWEEP_CACHE"
DEFAULT_CACHE = "~/.cache"
SCHEMES = ("s3", "gs", "abfs", "hdfs", "file")
MIRROR_FILE = ".mirror"  # in a mirror: the URI of what it mirrors
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")  # by them equal URIs are different storages
READABLE = 60  # characters of a mirror's name that say what it mirrors


def is_uri(place: str | Path) -> bool:
    """Raises UsageError for a URI that has been made a Path, which leaves out a slash."""
    text = os.fspath(place)
    if re.match(rf"({'|'.join(SCHEMES)}):/(?!/)", text):
        raise UsageError(f"{text!r} is no folder, and a URI only as text", remedy="Write it without Path().")
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def cache_folder() -> Path:
    """What this machine keeps for later: RAYSWEEP_CACHE, else raysweep in XDG_CACHE_HOME, else ~/.cache/raysweep. May
    not be there."""
    own = os.environ.get(CACHE_VARIABLE)
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or DEFAULT_CACHE) / "raysweep"
    return Path(os.path.expanduser(folder)).absolute()


def mirror_folder(uri: str) -> Path:
    """The local folder that mirrors a storage, in `cache_folder`; made where it is not there.

    Raises UsageError for a URI with a password, which would lie around in files, and where it cannot be made.
    """
    parts = urlsplit(uri)
    if parts.password is not None:
        raise UsageError(
            f"a password stands in the URI of the storage on {parts.hostname}",
            remedy="Give it by the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile.",
        )
    if parts.scheme.lower() not in SCHEMES:
        raise UsageError(
            f"storage {uri!r} is no folder, and no URI that can be used",
            allowed="a folder, or a URI of " + ", ".join(f"{known}://" for known in SCHEMES),
            nearest=nearest_name(parts.scheme.lower(), list(SCHEMES)),
        )
    plain = _plain(parts)
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", f"{parts.scheme}-{parts.netloc}{parts.path}")[:READABLE]
    endpoint = next(filter(None, map(os.environ.get, ENDPOINTS)), "") if parts.scheme == "s3" else ""
    folder = cache_folder() / f"{readable.strip('-')}-{fingerprint([plain, endpoint])[:8]}"
    marker = folder / MIRROR_FILE
    if not marker.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = marker.with_name(f"{MIRROR_FILE}.{secrets.token_hex(4)}")
            temporary.write_text(plain, encoding="utf-8")
            temporary.replace(marker)
        except OSError as error:
            raise UsageError(
                f"the mirror of {plain} cannot be made: {error}",
                remedy=f"Name a folder for mirrors by {CACHE_VARIABLE}.",
            ) from error
    return folder


def mirrored_uri(storage: Path) -> str | None:
    """The URI of what a folder mirrors; None where it is an ordinary storage."""
    try:
        return (storage / MIRROR_FILE).read_text(encoding="utf-8")
    except OSError:
        return None


def is_shared(sweep: Path) -> bool:
    """Whether what lies in a sweep's folder can be the same on all nodes: mirrors are each node's own, unless the user
    has named a place for them."""
    return mirrored_uri(sweep.parent) is None or bool(os.environ.get(CACHE_VARIABLE))


def sweep_uri(storage: str, name: str) -> str:
    """The URI of a sweep in a storage."""
    parts = urlsplit(storage)
    return _plain(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def split_sweep(uri: str) -> tuple[str, str]:
    """The URI of the storage and the name of the sweep of which a URI is."""
    parts = urlsplit(uri)
    path, _, name = parts.path.rstrip("/").rpartition("/")
    return _plain(parts._replace(path=path)), name


def place_of(folder: Path) -> str:
    """Where a sweep lies, as `load_results` takes it: its URI, or its absolute path."""
    storage = mirrored_uri(folder.parent)
    return str(folder.absolute()) if storage is None else sweep_uri(storage, folder.name)


def _plain(parts: SplitResult) -> str:
    """Without what makes equal places look different. Put together by hand: urlunsplit leaves out an empty host."""
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme.lower()}://{parts.netloc}{parts.path.rstrip('/')}{query}"
