"""Windows that are kept are those that were cut, and are cut again once anything has changed that they come from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raysweep.errors import UsageError
from raysweep.model import known, known_tokens
from raysweep.model.checkpoint import ModelSource
from raysweep.model.text import TextSource
from raysweep.model.tokenizer import load_tokenizer
from raysweep.model.tokens import TokenSet, calibration_tokens, validation_tokens

ASKED = {"sampling": "pack", "num_samples": 3, "sequence_length": 16, "seed": 0}

Ask = Callable[..., TokenSet]


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.fixture
def text(tiny_documents: list[str], tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("\n\n".join(tiny_documents[:300]))
    return tmp_path / "text.txt"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was cut, with a cache of this test's own in `cache`."""
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "cache"))
    return []


@pytest.fixture
def ask(made: list[str], model: Path, text: Path) -> Ask:
    def asking(path: Path = text, trust: bool = False, **changes: object) -> TokenSet:
        source, asked = TextSource(str(path)), ASKED | changes

        def make() -> TokenSet:
            made.append("calibration")
            return calibration_tokens(load_tokenizer(model), source, **asked)

        return known_tokens.known_tokens(
            "calibration", ModelSource(str(model), None, trust), source, asked, make
        )

    return asking


def test_what_is_kept_is_what_was_cut(ask, made, text):
    first, again = ask(), ask()
    assert made == ["calibration"]
    assert again.content_hash == first.content_hash
    assert (again.name, again.source) == ("calibration", TextSource(str(text)))
    assert again.input_ids.dtype == np.int64
    assert not again.input_ids.flags.writeable


@pytest.mark.parametrize("change", [{"seed": 1}, {"num_samples": 2}, {"sequence_length": 8}])
def test_what_is_asked_for_otherwise_is_cut(ask, made, change):
    assert ask().content_hash != ask(**change).content_hash
    assert len(made) == 2


def test_a_change_of_text_or_tokenizer_is_seen(ask, made, model, text):
    before, times = ask(), text.stat()
    text.write_text(text.read_text()[::-1])
    os.utime(text, ns=(times.st_atime_ns, times.st_mtime_ns))  # as copies that keep times do
    assert ask().content_hash != before.content_hash
    fields = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(fields | {"model_max_length": 77}))
    ask()
    assert len(made) == 3


def test_other_code_cuts_again(ask, made, monkeypatch):
    ask()
    monkeypatch.setattr(known, "version", lambda name: "another")
    ask()
    assert len(made) == 2


def test_a_tokenizer_with_code_of_its_own_always_works(ask, made):
    for _ in range(2):
        ask(trust=True)
    assert len(made) == 2


@pytest.mark.parametrize("damage", [b"", b"no array", None])
def test_a_damaged_file_is_cut_anew(ask, made, tmp_path, damage):
    tokens = ask()
    (kept,) = (tmp_path / "cache" / "tokens").glob("*.npy")
    content = kept.read_bytes()
    kept.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage is None else damage)
    assert ask().content_hash == ask().content_hash == tokens.content_hash
    assert len(made) == 2


def test_large_sets_are_not_kept(ask, made, monkeypatch):
    monkeypatch.setattr(known_tokens, "LARGEST", 3 * 16 * 8 - 1)
    for _ in range(2):
        ask()
    assert len(made) == 2


def test_where_nothing_can_be_kept_windows_are_cut(ask, made, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert ask().content_hash == ask().content_hash
    assert len(made) == 2


def test_refusals_come_every_time(ask, made, tmp_path):
    for _ in range(2):
        with pytest.raises(UsageError, match="no such file"):
            ask(tmp_path / "nowhere.txt")
    assert len(made) == 2


def test_sets_that_must_be_kept_clear_of_count(ask, made, model, text, tmp_path):
    """Validation windows lie in other blocks of text where calibration reads the same files."""
    other = shutil.copy(text, tmp_path / "other.txt")
    source, asked = TextSource(str(text)), {"samples": 2, "sequence_length": 16, "seed": 0}

    def validation(beside: TokenSet) -> TokenSet:
        def make() -> TokenSet:
            made.append("validation")
            return validation_tokens(load_tokenizer(model), source, exclude=[beside], **asked)

        return known_tokens.known_tokens("validation", ModelSource(str(model)), source, asked, make, [beside])

    shared, apart = ask(), ask(other)
    assert validation(shared).content_hash != validation(apart).content_hash
    assert validation(shared).content_hash == validation(shared).content_hash
    assert made.count("validation") == 2
