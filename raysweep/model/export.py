"""A pruned model as an ordinary Hugging Face folder: the checkpoint's files with a trial's weights, and its masks."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raysweep.errors import RaysweepError, StorageError, UsageError, first_line
from raysweep.model.block_files import read_tensors
from raysweep.model.checkpoint import CONFIG, INDEX, Checkpoint, ModelSource
from raysweep.model.layout import Part, uses_of, write_back
from raysweep.model.linears import block_linears, find_blocks
from raysweep.model.loading import DTYPES, build_skeleton, layout_of
from raysweep.model.tokenizer import load_tokenizer
from raysweep.pruning.mask_file import WEIGHT_SUFFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASKS = "masks.safetensors"
DTYPE_KEYS = ("dtype", "torch_dtype")  # of config.json, in new versions of transformers and in old ones
BESIDE = (  # what else makes a model usable, where it has it: generation, tokenizer, chat template, licence
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
)


@dataclass(frozen=True)
class Written:
    """What lies in an exported folder.

    files: names, in the order of writing;  dtypes: of the weights, the most frequent first
    rounded: whether weights of the trial are not exactly what was written
    zeros, prunable: removed weights, and weights of the linears that were pruned
    """

    files: list[str]
    dtypes: list[str]
    rounded: bool
    zeros: int
    prunable: int

    @property
    def dtype(self) -> str:
        return " and ".join(self.dtypes)


class BlockTensors(Mapping[str, Tensor]):
    """The tensors that lie in a folder by block, by full name. A file is read as a whole, and the last one is kept."""

    def __init__(self, folder: Path) -> None:
        """Raises RaysweepError for files that cannot be read; what is damaged is found when it is asked for."""
        self._files = {
            name: file for file in sorted(folder.glob("block-*.safetensors")) for name in _names_in(file)
        }
        self._read: tuple[Path, dict[str, Tensor]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        if self._read is None or self._read[0] != file:
            self._read = None  # before another one takes as much memory
            self._read = (file, read_tensors(file)[0])
        return self._read[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def place(self, name: str) -> str:
        """Equal for tensors that are read together."""
        return self._files[name].name if name in self._files else ""

    def check(self) -> None:
        """Reads everything once. Raises RaysweepError for what is damaged."""
        for file in dict.fromkeys(self._files.values()):
            read_tensors(file)


def _names_in(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise RaysweepError(f"{file} cannot be read: {first_line(error)}") from error


class Replacements:
    """What the weights of a trial make of the tensors of a checkpoint."""

    def __init__(
        self, model: PreTrainedModel, checkpoint: Checkpoint, weights: BlockTensors, linears: Collection[str]
    ) -> None:
        """linears: under whose names `weights` has masks. Raises RaysweepError for weights of no tensor."""
        layout = layout_of(model, checkpoint)
        changed = [name for name in weights if name not in linears]
        if unknown := [name for name in changed if name not in layout]:
            raise RaysweepError(f"{unknown[0]} lies in no tensor of model {checkpoint.source.path!r}")
        shapes = {name: shape for name, (shape, _) in checkpoint.headers().items()}
        self._weights = weights
        self._uses = uses_of({name: layout[name] for name in changed}, shapes)

    def in_reading_order(self, stored: list[str]) -> list[str]:
        """Names of tensors of the checkpoint, those together that are read together."""
        return sorted(stored, key=lambda name: (self._place(name), name))

    def _place(self, stored: str) -> str:
        return self._weights.place(self._uses[stored][0].own) if stored in self._uses else ""

    def of(self, name: str, stored: Tensor) -> Tensor:
        """What stands in the place of a tensor of the checkpoint, in the dtype of the trial's weights; itself where it
        is the dense model's."""
        if name not in self._uses:
            return stored
        uses = self._uses[name]
        new = stored.to(self._weights[uses[0].own].dtype, copy=True)
        write_back(uses, new, self._weights)
        return new


def write_folder(
    source: ModelSource,
    weights: BlockTensors,
    folder: Path,
    dtype: str | None = None,
    updated: bool = False,
) -> Written:
    """Writes a model with the weights of a trial: in files cut and named as the checkpoint's, under its keys.

    weights: masks by linear and changed parameters by full name, as `ShardWorker.write_weights` leaves them; what is
    missing is dense
    folder: exists and is empty;  dtype: of all weights, None for each the checkpoint's own
    updated: whether pruning itself has updated weights, which then lie beside the masks: read with the dense model the
    file gives the same pruned one. Of a trial that was recovered the masks alone say what was pruned
    Raises UsageError for a model that cannot be read, RaysweepError where weights do not fit their masks, StorageError.
    """
    config, checkpoint = source.load_config(), Checkpoint.open(source)
    model = build_skeleton(source, config, torch.float32)
    linears = _linear_names(model)
    replacements = Replacements(model, checkpoint, weights, linears)
    writer = _Writer(checkpoint, weights, replacements, folder, dtype)
    try:
        writer.write_masks(linears, updated)
        for file_name in checkpoint.file_names():
            writer.write_weights(file_name)
        writer.write_index()
        writer.write_config()
        writer.copy_the_rest()
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}") from error
    return writer.written()


def _vocabulary_files(source: ModelSource) -> list[str]:
    """Names of the files that the tokenizer's class reads; none where there is no tokenizer."""
    try:
        tokenizer = load_tokenizer(source.path, source.revision, source.trust_remote_code)
    except UsageError:
        return []
    return [name for name in tokenizer.vocab_files_names.values() if isinstance(name, str)]


def _linear_names(model: PreTrainedModel) -> set[str]:
    name, blocks = find_blocks(model)
    return {full for index, block in enumerate(blocks) for full in block_linears(block, f"{name}.{index}")}


class _Writer:
    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: BlockTensors,
        replacements: Replacements,
        folder: Path,
        dtype: str | None,
    ) -> None:
        self._checkpoint, self._weights, self._replacements = checkpoint, weights, replacements
        self._folder, self._dtype = folder, dtype
        self._files: list[str] = []
        self._numbers: Counter[str] = Counter()  # of written weights, by dtype
        self._bytes, self._rounded, self._zeros, self._prunable = 0, False, 0, 0

    def write_masks(self, linears: Collection[str], updated: bool) -> None:
        tensors: dict[str, Tensor] = {}
        for name in (name for name in self._weights if name in linears):
            mask, weight = self._weights[name], self._weights[f"{name}{WEIGHT_SUFFIX}"]
            if bool(weight[mask == 0].any()):
                raise RaysweepError(
                    f"{name} has weights where its mask has none: it was not written by a sweep"
                )
            tensors |= {name: mask, **({f"{name}{WEIGHT_SUFFIX}": weight} if updated else {})}
            self._zeros += mask.numel() - int(mask.count_nonzero())
            self._prunable += mask.numel()
        self._save(MASKS, tensors)

    def write_weights(self, file_name: str) -> None:
        """One file of the checkpoint."""
        mine = [name for name, file in self._checkpoint.files.items() if file == file_name]
        whole = self._checkpoint.read([(Part(name),) for name in mine])
        tensors = {parts[0].stored: tensor for parts, tensor in whole}
        for name in self._replacements.in_reading_order(mine):
            stored = tensors[name]
            tensors[name] = self._cast(name, self._replacements.of(name, stored), stored.dtype)
            self._bytes += tensors[name].nbytes
        self._save(file_name, tensors)

    def _cast(self, name: str, tensor: Tensor, stored: torch.dtype) -> Tensor:
        if not stored.is_floating_point:
            return tensor
        cast = tensor.to(DTYPES[self._dtype] if self._dtype else stored)
        if not bool(torch.isfinite(cast).all()):
            raise RaysweepError(
                f"{name} has weights that {str(cast.dtype).removeprefix('torch.')} cannot hold"
            )
        self._rounded |= not torch.equal(cast.to(tensor.dtype), tensor)
        self._numbers[str(cast.dtype).removeprefix("torch.")] += cast.numel()
        return cast

    def write_index(self) -> None:
        """Which file holds what, where there are several."""
        if (path := self._checkpoint.find(INDEX)) is not None:
            index = json.loads(Path(path).read_text(encoding="utf-8"))
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": self._bytes}
            self._write_json(INDEX, index)

    def write_config(self) -> None:
        path = Path(self._checkpoint.path_of(CONFIG))
        if self._dtype is None:
            self._copy(path)
            return
        config = json.loads(path.read_text(encoding="utf-8"))
        for section in (config, *(part for part in config.values() if isinstance(part, dict))):
            for key in DTYPE_KEYS:
                if key in section:
                    section[key] = self._dtype
        if not any(key in config for key in DTYPE_KEYS):
            config[DTYPE_KEYS[0]] = self._dtype
        self._write_json(CONFIG, config)

    def copy_the_rest(self) -> None:
        """Tokenizer, generation and licence; and the model's own code, where that was trusted."""
        for name in dict.fromkeys((*BESIDE, *_vocabulary_files(self._checkpoint.source))):
            if (path := self._checkpoint.find(name)) is not None:
                self._copy(Path(path))
        if self._checkpoint.source.trust_remote_code:
            for code in sorted(Path(self._checkpoint.path_of(CONFIG)).parent.glob("*.py")):
                self._copy(code)

    def written(self) -> Written:
        dtypes = [dtype for dtype, _ in self._numbers.most_common()]
        return Written(self._files, dtypes, self._rounded, self._zeros, self._prunable)

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        own, file = {key: tensor.contiguous() for key, tensor in tensors.items()}, self._add(name)
        file.touch()  # with the permissions of any new file, which the library's own are not
        mode = file.stat().st_mode
        try:
            save_file(own, file, {"format": "pt"})
            file.chmod(mode)
        except SafetensorError as error:  # of a full disk too
            raise StorageError(f"{file} cannot be written: {first_line(error)}") from error

    def _copy(self, path: Path) -> None:
        shutil.copyfile(path, self._add(path.name))

    def _write_json(self, name: str, content: Any) -> None:
        self._add(name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _add(self, name: str) -> Path:
        self._files.append(name)
        return self._folder / name
