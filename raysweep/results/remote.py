"""The files of one sweep in a storage that a URI names, by `pyarrow.fs`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import fs

from raysweep.errors import RaysweepError, StorageError, UsageError, first_line
from raysweep.results.uris import mirrored_uri, sweep_uri

OBJECT_STORES = ("s3", "gcs", "abfs")  # what is written there appears as a whole, and buckets must be there
ONE_REQUEST = "allow_delayed_open"
LOST_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws"


class Stamp(NamedTuple):
    """What tells versions of a remote file apart. seconds: when it was written, by the clock of the storage"""

    size: int
    seconds: int


class Remote:
    """A folder in a storage. Names are relative to it. Methods raise StorageError where the storage does not answer."""

    def __init__(self, uri: str) -> None:
        """Raises UsageError where the storage cannot be reached: unknown scheme, no such bucket, no credentials."""
        self.uri = uri
        try:
            self._files, self._base = _opened(uri)
            if self._is_object_store:
                self._check_bucket()
        except (OSError, pa.ArrowException) as error:
            raise _unreachable(uri, error) from error

    @property
    def _is_object_store(self) -> bool:
        return self._files.type_name in OBJECT_STORES

    def _check_bucket(self) -> None:
        """A listing of a bucket that does not exist would be an empty one."""
        bucket = self._base.partition("/")[0]
        if not bucket or self._files.get_file_info(bucket).type == fs.FileType.NotFound:
            raise UsageError(
                f"storage {self.uri}: there is no bucket {bucket!r}",
                remedy="Make it, or check its name and, with servers other than Amazon's, the endpoint: "
                "AWS_ENDPOINT_URL, or ?endpoint_override=HOST:PORT&scheme=http behind the URI.",
            )

    def listing(self) -> dict[str, Stamp]:
        """All files, by name."""
        selector = fs.FileSelector(self._base, recursive=True, allow_not_found=True)
        with self._told("read"):
            infos = self._files.get_file_info(selector)
        offset = len(self._base) + 1
        return {info.path[offset:]: _stamp(info) for info in infos if info.type == fs.FileType.File}

    def sweeps(self, signs: Sequence[str]) -> list[str]:
        """The names of the folders in it that hold any of some files or folders."""
        with self._told("read"):
            infos = self._files.get_file_info(fs.FileSelector(self._base, allow_not_found=True))
            names = sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)
            found = [
                self._files.get_file_info([self._path(f"{name}/{sign}") for sign in signs]) for name in names
            ]
        is_there = [any(info.type != fs.FileType.NotFound for info in infos) for infos in found]
        return [name for name, there in zip(names, is_there, strict=True) if there]

    def stamp(self, name: str) -> Stamp | None:
        """None where there is no such file."""
        with self._told("read"):
            info = self._files.get_file_info(self._path(name))
        return _stamp(info) if info.type == fs.FileType.File else None

    def read(self, name: str) -> bytes | None:
        """None where there is no such file."""
        with self._told("read"):
            try:
                with self._files.open_input_stream(self._path(name)) as stream:
                    content: bytes = stream.read()
                    return content
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file: others see the old contents or the new ones."""
        path = self._path(name)
        with self._told("written"):
            if self._is_object_store:
                self._write(path, content)
                return
            parent, _, last = path.rpartition("/")
            self._files.create_dir(parent, recursive=True)
            temporary = f"{parent}/.{last}.{secrets.token_hex(4)}.tmp"
            self._write(temporary, content)
            if self._files.type_name == "hdfs":  # which does not replace
                self.remove(name)
            self._files.move(temporary, path)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        with self._told("written"), suppress(FileNotFoundError):
            self._files.delete_file(self._path(name))

    def now(self) -> int:
        """This moment by the clock of the storage. Raises UsageError where it cannot be written."""
        name = f".clock-{secrets.token_hex(4)}"
        try:
            self.write(name, b"")
            stamp = self.stamp(name)
            self.remove(name)
        except StorageError as error:
            raise UsageError(error.message, remedy="Check permissions, or name another --storage.") from error
        return stamp.seconds if stamp is not None else 0

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _write(self, path: str, content: bytes) -> None:
        with self._files.open_output_stream(path) as stream:
            stream.write(content)

    @contextmanager
    def _told(self, done: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"storage {self.uri} cannot be {done}: {first_line(error)}") from error


def remote_of(folder: Path) -> Remote | None:
    """The remote side of a sweep's folder; None where it has none. Raises UsageError where it cannot be reached."""
    storage = mirrored_uri(folder.parent)
    return None if storage is None else Remote(sweep_uri(storage, folder.name))


def _opened(uri: str) -> tuple[Any, str]:
    """S3 gets small files in one request instead of three, unless the URI says otherwise or this pyarrow cannot."""
    if uri.startswith("s3:") and ONE_REQUEST not in uri:
        with suppress(pa.ArrowInvalid):
            return fs.FileSystem.from_uri(f"{uri}{'&' if '?' in uri else '?'}{ONE_REQUEST}=true")  # type: ignore[no-any-return]
    return fs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]


def _stamp(info: Any) -> Stamp:
    return Stamp(
        info.size, (info.mtime_ns or 0) // 10**9
    )  # some tell fractions in one answer and not in another


def _unreachable(uri: str, error: Exception) -> RaysweepError:
    if isinstance(error, pa.ArrowInvalid):
        return UsageError(f"storage {uri!r}: {first_line(error)}", remedy="Correct the URI.")
    remedy = "Check the URI, the network and the credentials"
    remedy += f" ({LOST_KEYS}), and the endpoint (AWS_ENDPOINT_URL)." if uri.startswith("s3:") else "."
    return UsageError(f"storage {uri} cannot be reached: {first_line(error)}", remedy=remedy)
