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
from raysweep.model.known_tokens import KnownTokens
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
    """What was cut, with a cache of this test's own in `cache`; what was changed just now is taken as settled."""
    monkeypatch.setattr(known, "UNSETTLED_S", 0.0)
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "cache"))
    return []


@pytest.fixture
def ask(made: list[str], model: Path, text: Path) -> Ask:
    def asking(path: Path = text, trust: bool = False, **changes: object) -> TokenSet:
        source, asked = TextSource(str(path)), ASKED | changes

        def make() -> TokenSet:
            made.append("calibration")
            return calibration_tokens(load_tokenizer(model), source, **asked)

        return KnownTokens(ModelSource(str(model), None, trust)).get(source, asked, make)

    return asking


def test_what_is_kept_is_what_was_cut(ask, made, text):
    first, again = ask(), ask()
    assert made == ["calibration"]
    assert again.content_hash == first.content_hash
    assert again.source == TextSource(str(text))
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


def test_what_was_changed_just_now_is_not_trusted(ask, made, monkeypatch):
    monkeypatch.setattr(known, "UNSETTLED_S", 3600.0)
    for _ in range(2):
        ask()
    assert len(made) == 2


def test_links_that_change_places_are_seen(ask, made, tmp_path, tiny_documents):
    """Files of a folder are read in the order of their names, wherever they lie."""
    for name, half in {"one": tiny_documents[:150], "two": tiny_documents[150:300]}.items():
        (tmp_path / name).write_text("\n\n".join(half))
    found = []
    for first, second in (("one", "two"), ("two", "one")):
        shutil.rmtree(tmp_path / "linked", ignore_errors=True)
        (tmp_path / "linked").mkdir()
        (tmp_path / "linked" / "a.txt").symlink_to(tmp_path / first)
        (tmp_path / "linked" / "b.txt").symlink_to(tmp_path / second)
        found.append(ask(tmp_path / "linked").content_hash)
    assert found[0] != found[1]
    assert len(made) == 2


def test_the_kind_of_a_file_counts(ask, made, tmp_path):
    lines = "\n".join(json.dumps({"text": f"{number} words that go on and on, " * 9}) for number in range(60))
    (tmp_path / "blob").write_text(lines)
    hashes = set()
    for name in ("text.jsonl", "again.txt"):
        (tmp_path / name).symlink_to(tmp_path / "blob")
        hashes.add(ask(tmp_path / name).content_hash)
    assert len(hashes) == 2


def test_any_file_beside_the_model_may_be_of_its_tokenizer(ask, made, model):
    ask()
    (model / "tokenizer.model.v3").write_text("a vocabulary of another kind")
    ask()
    (model / "model-00002-of-00002.safetensors").write_text("weights are none")
    ask()
    assert len(made) == 2


def test_a_tokenizer_that_changes_after_it_was_loaded_is_the_old_one(made, model, text):
    """A launch loads it once, for several sets."""
    source, loaded, before = (
        TextSource(str(text)),
        load_tokenizer(model),
        KnownTokens(ModelSource(str(model))),
    )
    fields = json.loads((model / "tokenizer.json").read_text())
    vocabulary = fields["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (model / "tokenizer.json").write_text(json.dumps(fields))
    old = before.get(source, ASKED, lambda: calibration_tokens(loaded, source, **ASKED))
    again = KnownTokens(ModelSource(str(model)))
    new = again.get(source, ASKED, lambda: calibration_tokens(load_tokenizer(model), source, **ASKED))
    assert new.content_hash != old.content_hash


@pytest.mark.parametrize("what", ["version", "__file__"])
def test_other_code_cuts_again(ask, made, model, monkeypatch, what):
    ask()
    monkeypatch.setattr(
        known, what, {"version": lambda name: "another", "__file__": str(model / "x.py")}[what]
    )
    ask()
    assert len(made) == 2


def test_a_tokenizer_with_code_of_its_own_always_works(ask, made):
    for _ in range(2):
        ask(trust=True)
    assert len(made) == 2


@pytest.mark.parametrize("damage", [b"", b"no array", b"PK", 0, 12, 40, -1])
def test_a_damaged_file_is_cut_anew(ask, made, tmp_path, damage):
    """damage: what is there instead, or the place of a wrong byte"""
    tokens = ask()
    (kept,) = (tmp_path / "cache" / "tokens").glob("*.npy")
    content = bytearray(kept.read_bytes())
    if isinstance(damage, int):
        content[damage] ^= 1
    kept.write_bytes(content if isinstance(damage, int) else damage)
    assert ask().content_hash == ask().content_hash == tokens.content_hash
    assert len(made) == 2


def test_what_was_used_last_stays(ask, made, tmp_path, monkeypatch):
    ask()
    folder = tmp_path / "cache" / "tokens"
    (first,) = folder.glob("*.npy")
    monkeypatch.setattr(known, "ROOM", 2 * first.stat().st_size)
    ask(seed=1)
    os.utime(first, (1, 1))
    ask()  # used again
    ask(seed=2)
    assert first.exists()
    assert len(list(folder.iterdir())) == 2
    assert len(made) == 3


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

        return KnownTokens(ModelSource(str(model))).get(source, asked, make, [beside])

    shared, apart = ask(), ask(other)
    assert validation(shared).content_hash != validation(apart).content_hash
    assert validation(shared).content_hash == validation(shared).content_hash
    assert made.count("validation") == 2
