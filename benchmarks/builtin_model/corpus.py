"""Builds the data of builtin:pystdlib from the standard library: text by split, tokenizer, token files.

Run with the interpreter whose library is meant (the shipped data: CPython 3.11.7):

    python benchmarks/builtin_model/corpus.py --work .builtin-data
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PACKAGE = Path(__file__).resolve().parents[2] / "raysweep" / "model" / "builtin" / "pystdlib"
SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.05  # of the modules, for validation and for test each
VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
# Written when the interpreter was installed, or not the release's own sources.
OUTSIDE_FOLDERS = ("site-packages", "__pycache__", "lib-dynload")
GENERATED_PREFIXES = ("_sysconfigdata", "config-", "ensurepip/_bundled")


def is_bulk_table(path: str, text: str) -> bool:
    """Whether a file is a generated character table (most of `encodings/`)."""
    return path.startswith("encodings/") and ("decoding_table" in text or "decoding_map" in text)


def read_library(root: Path) -> dict[str, str]:
    """The UTF-8 sources below `root` by relative path, without tables, generated files and duplicates."""
    texts: dict[str, str] = {}
    seen: set[str] = set()
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if any(part in OUTSIDE_FOLDERS for part in file.parts) or path.startswith(GENERATED_PREFIXES):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a few tests are written in other encodings on purpose
            continue
        if not text.strip() or text in seen or is_bulk_table(path, text):
            continue
        seen.add(text)
        texts[path] = text
    return texts


def module_of(path: str) -> str:
    """The module that a file belongs to, so that a module and its tests share a split.

    `asyncio/locks.py` and `test/test_asyncio/test_locks.py` are both `asyncio.locks`.
    """
    parts = [part.removeprefix("test_").strip("_") for part in path.removesuffix(".py").split("/")]
    kept = [part for part in parts if part not in ("test", "tests", "idle_test", "init", "")]
    return ".".join(kept) or path


def rank_of(name: str) -> float:
    """A number in [0, 1) from the SHA-256 of a name: the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def split_of(path: str) -> str:
    """The split of a file, by the rank of its module."""
    rank = rank_of(module_of(path))
    if rank < HELD_OUT_SHARE:
        return "test"
    return "validation" if rank < 2 * HELD_OUT_SHARE else "train"


def write_parquet(paths: list[str], texts: dict[str, str], target: Path) -> None:
    """Writes one row a file, columns `text` and `path`."""
    table = pa.table({"text": [texts[path] for path in paths], "path": paths})
    pq.write_table(table, target, compression="zstd", compression_level=19, use_dictionary=False)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer: every text has a spelling in it, nothing is normalised."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Saves what AutoTokenizer reads. No token is added by default: text in, its own tokens out."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def token_stream(paths: list[str], texts: dict[str, str], tokenizer: Tokenizer) -> np.ndarray:
    """All files one after another, the end-of-text token before each, uint16."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch([texts[path] for path in paths])
    return np.concatenate([np.array([end, *encoding.ids], dtype=np.uint16) for encoding in encodings])


def write_split(
    split: str, paths: list[str], texts: dict[str, str], tokenizer: Tokenizer, work: Path
) -> dict[str, int]:
    """Writes a split's text into the package and its tokens into the working folder; returns their sizes."""
    shipped = PACKAGE / "text" / f"{split}.parquet"
    write_parquet(paths, texts, shipped)
    tokens = token_stream(paths, texts, tokenizer)
    tokens.tofile(work / f"{split}.bin")
    return {
        "files": len(paths),
        "bytes": sum(len(texts[path].encode()) for path in paths),
        "tokens": len(tokens),
        "parquet_bytes": shipped.stat().st_size,
    }


def main() -> None:
    """Writes text and tokenizer into the package, tokens into the working folder, sizes beside itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--work", type=Path, default=Path(".builtin-data"))
    arguments = parser.parse_args()
    for folder in (arguments.work, PACKAGE / "text", PACKAGE / "model"):
        folder.mkdir(parents=True, exist_ok=True)
    texts = read_library(arguments.library)
    paths = {split: sorted((p for p in texts if split_of(p) == split), key=rank_of) for split in SPLITS}
    tokenizer = train_tokenizer([texts[path] for path in paths["train"]])
    save_tokenizer(tokenizer, PACKAGE / "model")
    report: dict[str, object] = {"python": platform.python_version()}
    for split in SPLITS:
        report[split] = write_split(split, paths[split], texts, tokenizer, arguments.work)
    (Path(__file__).parent / "corpus.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
