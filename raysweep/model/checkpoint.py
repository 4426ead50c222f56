"""Where a Hugging Face model lies, and its files: which there are, what is in them, and tensors one by one.

No torch before a tensor is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.config.paths import typed_path
from raysweep.errors import UsageError, first_line
from raysweep.model.builtin import resolve_model_path
from raysweep.model.hub_ids import is_hub_id

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from raysweep.model.layout import Part

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
ALLOWED_PATHS = "builtin:NAME, a folder with config.json and safetensors files, or a Hugging Face id"
_FILE_NAME = re.compile(r"[\w-][\w .=+-]{0,200}\.safetensors")


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies: a builtin name, a folder with config.json and safetensors, or a Hugging Face id."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def location(self) -> str:
        """A folder, or a Hugging Face id."""
        return str(typed_path(resolve_model_path(self.path), "model"))

    @property
    def portable_path(self) -> str:
        """`path` as other processes of this file system may use it: a folder's is absolute."""
        return str(Path(self.path).absolute()) if Path(self.path).is_dir() else self.path

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()

    def load_config(self) -> PretrainedConfig:
        """The model's configuration. Raises UsageError when there is none to be had."""
        self.check_folder()
        from transformers import AutoConfig

        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.location, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # it checks little of the file, and ends in whatever it meets first
            raise UsageError(
                f"model {self.path!r} cannot be read: {first_line(error)}",
                allowed=ALLOWED_PATHS,
                remedy=self._remedy(error),
            ) from error
        return config

    def _remedy(self, error: Exception) -> str | None:
        if "trust_remote_code" in str(error):
            return (
                "Code that comes with a model runs only where model.trust_remote_code is true; read it first."
            )
        if self.is_local:
            return None
        here = Path(self.location).absolute()
        return (
            f"There is no folder {here}, so it was taken for a Hugging Face id. Check the spelling; a gated model "
            "needs HF_TOKEN; without a network HF_HUB_OFFLINE=1 finds what was downloaded before."
        )

    def check_folder(self) -> None:
        """Raises UsageError where the path can only be a folder's, and is none of a model."""
        folder = Path(self.location)
        names_a_folder = self.path.startswith(".") or not is_hub_id(self.path) or folder.exists()
        if names_a_folder and not (folder / CONFIG).is_file():
            raise UsageError(
                f"model {self.path!r} is no folder with a {CONFIG}",
                allowed=ALLOWED_PATHS,
                remedy=None if folder.exists() else f"There is no folder {folder.absolute()}.",
            )


@dataclass
class Checkpoint:
    """The safetensors files of a model, read tensor by tensor. `bytes_read` counts the tensors' bytes.

    Files of a Hugging Face id are downloaded one by one, when a tensor in them is first asked for.
    """

    source: ModelSource
    bytes_read: int = 0
    files: dict[str, str] = field(default_factory=dict)  # tensor name -> file name

    @classmethod
    def open(cls, source: ModelSource) -> Checkpoint:
        """Raises UsageError when the model has no safetensors weights, or a damaged list of them."""
        checkpoint = cls(source)
        if (index := checkpoint.find(INDEX)) is not None:
            checkpoint.files = _indexed(index, source)
        elif (single := checkpoint.find(SINGLE)) is not None:
            checkpoint.files = dict.fromkeys(_names(single, source), SINGLE)
        else:
            reach = "" if source.is_local else " within reach"
            raise UsageError(
                f"model {source.path!r} has no safetensors weights{reach}",
                allowed=f"{SINGLE}, or {INDEX} with the files that it names",
                remedy="Load it once with transformers and save it again with save_pretrained.",
            )
        return checkpoint

    def file_names(self) -> list[str]:
        return sorted(set(self.files.values()))

    def path_of(self, file_name: str) -> str:
        """The local path of one weight file, downloaded if need be. Raises UsageError when there is none."""
        path = self.find(file_name)
        if path is None:
            raise UsageError(f"model {self.source.path!r}: {file_name} is not there")
        return path

    def find(self, file_name: str) -> str | None:
        """The local path of any file of the model, downloaded if need be; None where it has no such file."""
        if self.source.is_local:
            path = Path(self.source.location) / file_name
            return str(path) if path.is_file() else None
        return _download(self.source, file_name)

    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type (F32) of every tensor, as the files say; reads no tensor. Raises UsageError."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for file_name in self.file_names():
            with _opened(self.path_of(file_name), self.source) as tensors:
                for name in (name for name in tensors.keys() if self.files.get(name) == file_name):  # noqa: SIM118
                    part = tensors.get_slice(name)
                    found[name] = (tuple(part.get_shape()), part.get_dtype())
        return found

    def read(self, wanted: Iterable[Sequence[Part]]) -> Iterator[tuple[Sequence[Part], Tensor]]:
        """What the lists of parts are made of, each list once, in the order of files; no more than that is read."""
        from raysweep.model.layout import assembled

        with ExitStack() as stack:
            opened: dict[str, Any] = {}
            for parts in sorted(wanted, key=lambda parts: self.files[parts[0].stored]):
                read: list[Tensor] = []
                for part in parts:
                    file_name = self.files[part.stored]
                    if file_name not in opened:
                        opened[file_name] = stack.enter_context(
                            _opened(self.path_of(file_name), self.source, "pt")
                        )
                    read.append(part.of(opened[file_name].get_slice(part.stored)))
                    self.bytes_read += read[-1].nbytes
                self._check_together(parts, read)
                yield parts, assembled(read)

    def _check_together(self, parts: Sequence[Part], read: Sequence[Tensor]) -> None:
        if len({tuple(tensor.shape[1:]) for tensor in read}) > 1:
            shapes = ", ".join(
                f"{part.stored} {tuple(tensor.shape)} in {self.files[part.stored]}"
                for part, tensor in zip(parts, read, strict=True)
            )
            raise UsageError(f"model {self.source.path!r}: shapes do not fit together: {shapes}")


def _indexed(path: str, source: ModelSource) -> dict[str, str]:
    """Tensor name to file name, as an index file has it."""
    try:
        files: dict[str, str] = dict(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{INDEX} of model {source.path!r} is damaged: {first_line(error)}") from error
    for name, file_name in files.items():
        if not isinstance(file_name, str) or not _FILE_NAME.fullmatch(file_name):
            raise UsageError(
                f"{INDEX} of model {source.path!r} says that {name!r} lies in {str(file_name)[:80]!r}",
                allowed="names of safetensors files beside it",
            )
    return files


def _names(path: str, source: ModelSource) -> list[str]:
    with _opened(path, source) as tensors:
        return list(tensors.keys())


@contextmanager
def _opened(path: str, source: ModelSource, framework: str = "numpy") -> Iterator[Any]:
    """A safetensors file. Within the context, one that is damaged ends in a UsageError that names it.

    framework: whose tensors it gives; names, shapes and types need none
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{Path(path).name} of model {source.path!r} is damaged: {first_line(error)}"
        ) from error


def _download(source: ModelSource, file_name: str) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return hf_hub_download(source.location, file_name, revision=source.revision)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UsageError(f"model {source.path!r} cannot be downloaded: {first_line(error)}") from error
