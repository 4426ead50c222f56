"""Token windows against the whole text tokenised plainly: which windows, where from, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysweep.errors import UsageError
from raysweep.model.passages import SEPARATOR, free_spans, reserved_spans
from raysweep.model.text import TextSource
from raysweep.model.tokenizer import load_tokenizer
from raysweep.model.tokens import (
    TokenSet,
    calibration_tokens,
    check_vocabulary,
    evaluation_tokens,
    validation_tokens,
)

LENGTH = 32


@pytest.fixture
def source(tiny_text: Path) -> TextSource:
    return TextSource(str(tiny_text))


@pytest.fixture
def text(tiny_documents: list[str]) -> str:
    return SEPARATOR.join(tiny_documents[:300])


def calibrate(tokenizer: Any, source: TextSource, **changes: Any) -> TokenSet:
    settings = {"sampling": "pack", "num_samples": 24, "sequence_length": LENGTH, "seed": 0} | changes
    return calibration_tokens(tokenizer, source, **settings)


def write_rows(path: Path, lengths: list[int]) -> TextSource:
    rows = [[100 * number + position for position in range(length)] for number, length in enumerate(lengths)]
    pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}), path)
    return TextSource(str(path))


def fragments(tokenizer: Any, tokens: TokenSet) -> list[str]:
    """The texts of all windows, apart where passages or documents were joined, without the short ends."""
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens.input_ids]
    return [part for text in texts for part in text.split(SEPARATOR) if len(part) > 20]


class TestPackedCalibration:
    def test_windows_are_pieces_of_the_text_that_calibration_may_use(
        self, tiny_tokenizer: Any, source: TextSource, text: str
    ) -> None:
        free = [text[start:end] for start, end in free_spans(text)]
        parts = fragments(tiny_tokenizer, calibrate(tiny_tokenizer, source))
        assert len(parts) >= 24
        assert all(any(part in span for span in free) for part in parts)

    def test_windows_differ_and_come_from_all_over_the_text(
        self, tiny_tokenizer: Any, source: TextSource, text: str
    ) -> None:
        tokens = calibrate(tiny_tokenizer, source)
        assert tokens.input_ids.shape == (24, LENGTH)
        assert len(np.unique(tokens.input_ids, axis=0)) == 24
        places = [text.index(part) / len(text) for part in fragments(tiny_tokenizer, tokens)]
        assert min(places) < 0.2
        assert max(places) > 0.8

    def test_the_seed_and_nothing_else_chooses(self, tiny_tokenizer: Any, source: TextSource) -> None:
        first, again, other = (calibrate(tiny_tokenizer, source, seed=seed) for seed in (3, 3, 4))
        assert first.content_hash == again.content_hash
        assert not np.array_equal(first.input_ids, other.input_ids)

    def test_every_window_of_the_free_text_can_be_had_and_no_more(
        self, tiny_tokenizer: Any, source: TextSource
    ) -> None:
        with pytest.raises(UsageError, match="100000 windows of 32 tokens were asked for") as caught:
            calibrate(tiny_tokenizer, source, num_samples=100_000)
        most = int(caught.value.what.rsplit("gives ", 1)[1])
        tokens = calibrate(tiny_tokenizer, source, num_samples=most)
        assert len(np.unique(tokens.input_ids, axis=0)) == most
        with pytest.raises(UsageError, match=f"gives {most}"):
            calibrate(tiny_tokenizer, source, num_samples=most + 1)

    def test_a_data_set_gives_the_windows_of_its_own_prefix(
        self, tiny_tokenizer: Any, tiny_documents: list[str], tmp_path: Path
    ) -> None:
        pq.write_table(pa.table({"text": tiny_documents}), tmp_path / "long.parquet")
        streamed = TextSource("parquet", data_files=str(tmp_path / "long.parquet"))
        characters = np.cumsum([len(document) for document in tiny_documents])
        needed = int(np.searchsorted(characters, 32 * 24 * LENGTH)) + 1
        pq.write_table(pa.table({"text": tiny_documents[:needed]}), tmp_path / "prefix.parquet")
        prefix = TextSource(str(tmp_path / "prefix.parquet"))
        assert needed < len(tiny_documents)
        assert (
            calibrate(tiny_tokenizer, streamed).content_hash == calibrate(tiny_tokenizer, prefix).content_hash
        )


class TestDocumentCalibration:
    def test_every_window_lies_in_a_long_document_of_its_own(
        self, tiny_tokenizer: Any, source: TextSource, tiny_documents: list[str]
    ) -> None:
        tokens = calibrate(tiny_tokenizer, source, sampling="document", sequence_length=64)
        ids = [tiny_tokenizer(document)["input_ids"] for document in tiny_documents[:300]]
        homes = []
        for row in tokens.input_ids:
            spelled = tiny_tokenizer.decode(row, skip_special_tokens=True)
            homes += [number for number, document in enumerate(tiny_documents) if spelled in document]
        assert len(homes) == len(set(homes)) == 24
        assert all(len(ids[number]) >= 64 for number in homes)

    def test_windows_start_anywhere(self, tiny_tokenizer: Any, source: TextSource) -> None:
        tokens = calibrate(tiny_tokenizer, source, sampling="document")
        at_the_start = tokens.input_ids[:, 0] == tiny_tokenizer.bos_token_id
        assert at_the_start.mean() < 0.5

    def test_too_few_long_documents_are_refused(self, tiny_tokenizer: Any, source: TextSource) -> None:
        with pytest.raises(UsageError, match="24 windows of 5000 tokens were asked for"):
            calibrate(tiny_tokenizer, source, sampling="document", sequence_length=5000)


class TestRows:
    def test_the_first_rows_are_the_samples_in_order(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "rows.parquet", [40, 32, 50, 32])
        tokens = calibrate(None, source, num_samples=3, seed=7)
        assert tokens.input_ids[:, 0].tolist() == [0, 100, 200]
        assert tokens.input_ids[2].tolist() == list(range(200, 232))
        assert tokens.input_ids.dtype == np.int64

    def test_a_short_row_is_refused_with_its_number(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "rows.parquet", [40, 31])
        assert len(calibrate(None, source, num_samples=1)) == 1
        with pytest.raises(UsageError, match="row 1 of .* has 31 tokens, and 32 were asked for"):
            calibrate(None, source, num_samples=2)

    def test_a_null_within_a_row_is_refused_with_its_number(self, tmp_path: Path) -> None:
        rows = pa.array([[1] * 32, [1, None] * 16], pa.list_(pa.int32()))
        pq.write_table(pa.table({"input_ids": rows}), tmp_path / "rows.parquet")
        source = TextSource(str(tmp_path / "rows.parquet"))
        assert len(calibrate(None, source, num_samples=1)) == 1
        with pytest.raises(UsageError, match="row 1 of .* has a null"):
            calibrate(None, source, num_samples=2)

    def test_damaged_pages_are_refused(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "rows.parquet", [32] * 99)
        content = bytearray((tmp_path / "rows.parquet").read_bytes())
        content[4:400] = b"\xff" * 396
        (tmp_path / "rows.parquet").write_bytes(content)
        with pytest.raises(UsageError, match="cannot read .*rows.parquet"):
            calibrate(None, source, num_samples=1)

    def test_more_samples_than_rows_are_refused(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "rows.parquet", [32, 32])
        with pytest.raises(UsageError, match=r"num_samples: 3 windows .* gives 2"):
            calibrate(None, source, num_samples=3)

    def test_ids_that_are_no_integers_are_refused(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"input_ids": [[0.5] * 32]}), tmp_path / "rows.parquet")
        with pytest.raises(UsageError) as caught:
            calibrate(None, TextSource(str(tmp_path / "rows.parquet")), num_samples=1)
        assert caught.value.allowed == "lists of integers"

    def test_validation_takes_the_last_rows_and_none_of_calibration(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "rows.parquet", [32] * 5)
        used = [calibrate(None, source, num_samples=count) for count in (1, 3)]
        tokens = validation_tokens(None, source, samples=2, sequence_length=LENGTH, seed=0, exclude=used)
        assert tokens.input_ids[:, 0].tolist() == [300, 400]
        with pytest.raises(UsageError, match="gives 2 beside those of calibration"):
            validation_tokens(None, source, samples=3, sequence_length=LENGTH, seed=0, exclude=used)

    def test_all_rows_or_the_first_are_the_evaluation_windows(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "rows.parquet", [32] * 5)
        assert len(evaluation_tokens(None, source, sequence_length=LENGTH)) == 5
        first = evaluation_tokens(None, source, sequence_length=LENGTH, max_windows=2)
        assert first.input_ids[:, 0].tolist() == [0, 100]


class TestValidation:
    def validate(
        self, tokenizer: Any, source: TextSource, exclude: list[TokenSet], **changes: Any
    ) -> TokenSet:
        settings = {"samples": 16, "sequence_length": LENGTH, "seed": 0} | changes
        return validation_tokens(tokenizer, source, exclude=exclude, **settings)

    def test_windows_come_from_text_that_calibration_never_uses(
        self, tiny_tokenizer: Any, source: TextSource, text: str
    ) -> None:
        kept = [text[start:end] for start, end in reserved_spans(text)]
        tokens = self.validate(tiny_tokenizer, source, [calibrate(tiny_tokenizer, source)])
        parts = fragments(tiny_tokenizer, tokens)
        assert len(parts) >= 16
        assert all(any(part in span for span in kept) for part in parts)

    def test_windows_stay_the_same_when_calibration_sets_are_added(
        self, tiny_tokenizer: Any, source: TextSource
    ) -> None:
        one = [calibrate(tiny_tokenizer, source)]
        more = [*one, calibrate(tiny_tokenizer, source, seed=1, num_samples=8, sequence_length=64)]
        first, second = (self.validate(tiny_tokenizer, source, sets) for sets in (one, more))
        assert first.content_hash == second.content_hash
        assert first.content_hash != self.validate(tiny_tokenizer, source, one, seed=1).content_hash

    def test_the_same_file_is_recognised_under_another_name(
        self, tiny_tokenizer: Any, source: TextSource, tiny_text: Path
    ) -> None:
        exclude = [calibrate(tiny_tokenizer, source)]
        same = TextSource(str(tiny_text / "train.parquet"), split="any")
        tokens = self.validate(tiny_tokenizer, source, exclude)
        assert self.validate(tiny_tokenizer, same, exclude).content_hash == tokens.content_hash

    def test_another_split_is_used_whole(
        self, tiny_tokenizer: Any, source: TextSource, tiny_text: Path, tiny_documents: list[str]
    ) -> None:
        other = TextSource(str(tiny_text), split="test")
        tokens = self.validate(tiny_tokenizer, other, [calibrate(tiny_tokenizer, source)], samples=100)
        parts = fragments(tiny_tokenizer, tokens)
        text = SEPARATOR.join(tiny_documents[300:])
        free = [text[start:end] for start, end in free_spans(text)]
        assert all(part in text for part in parts)
        assert any(part in span for part in parts for span in free)

    def test_too_little_text_left_is_refused(self, tiny_tokenizer: Any, source: TextSource) -> None:
        with pytest.raises(UsageError, match=r"^samples: 5000 windows"):
            self.validate(tiny_tokenizer, source, [calibrate(tiny_tokenizer, source)], samples=5000)


class TestEvaluation:
    def test_windows_are_the_joined_text_tokenised_once(
        self, tiny_tokenizer: Any, source: TextSource, text: str
    ) -> None:
        ids = tiny_tokenizer(text)["input_ids"]
        tokens = evaluation_tokens(tiny_tokenizer, source, sequence_length=LENGTH)
        assert len(tokens) == len(ids) // LENGTH
        assert tokens.input_ids.ravel().tolist() == ids[: len(tokens) * LENGTH]
        assert (tokens.input_ids == tiny_tokenizer.bos_token_id).sum() == 1

    @pytest.mark.parametrize("count", [1, 7, 300])
    def test_fewer_windows_are_the_first_ones(
        self, tiny_tokenizer: Any, source: TextSource, count: int
    ) -> None:
        everything = evaluation_tokens(tiny_tokenizer, source, sequence_length=LENGTH)
        first = evaluation_tokens(tiny_tokenizer, source, sequence_length=LENGTH, max_windows=count)
        assert np.array_equal(first.input_ids, everything.input_ids[:count])

    def test_more_windows_than_there_are_gives_all(self, tiny_tokenizer: Any, source: TextSource) -> None:
        everything = evaluation_tokens(tiny_tokenizer, source, sequence_length=LENGTH)
        tokens = evaluation_tokens(tiny_tokenizer, source, sequence_length=LENGTH, max_windows=10**6)
        assert tokens.content_hash == everything.content_hash

    def test_bos_in_each_window_takes_the_place_of_one_token(
        self, tiny_tokenizer: Any, source: TextSource, text: str
    ) -> None:
        ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = evaluation_tokens(
            tiny_tokenizer, source, sequence_length=LENGTH, max_windows=5, bos_each_window=True
        )
        assert tokens.input_ids.shape == (5, LENGTH)
        assert (tokens.input_ids[:, 0] == tiny_tokenizer.bos_token_id).all()
        assert tokens.input_ids[:, 1:].ravel().tolist() == ids[: 5 * (LENGTH - 1)]

    def test_text_shorter_than_a_window_is_refused(self, tiny_tokenizer: Any, tmp_path: Path) -> None:
        path = tmp_path / "short.txt"
        path.write_text("mi no")
        with pytest.raises(UsageError, match="sequence_length: .* gives no window of 32 tokens"):
            evaluation_tokens(tiny_tokenizer, TextSource(str(path)), sequence_length=LENGTH)

    def test_a_real_tokenizer_on_wikitext(self, shared: Path) -> None:
        tokenizer = load_tokenizer(shared / "data" / "models" / "stories260K")
        path = shared / "data" / "text" / "wikitext-2-raw" / "test.parquet"
        rows = pq.read_table(path).column("text").to_pylist()
        ids = tokenizer("\n\n".join(rows), verbose=False)["input_ids"]
        tokens = evaluation_tokens(tokenizer, TextSource(str(path)), sequence_length=512, max_windows=40)
        assert tokens.input_ids.ravel().tolist() == ids[: 40 * 512]


def test_a_sequence_longer_than_the_model_takes_is_refused(tiny_tokenizer: Any, source: TextSource) -> None:
    for tokens_of in (
        lambda: calibrate(tiny_tokenizer, source, max_positions=16),
        lambda: validation_tokens(
            tiny_tokenizer, source, samples=1, sequence_length=32, seed=0, max_positions=16
        ),
        lambda: evaluation_tokens(tiny_tokenizer, source, sequence_length=32, max_positions=16),
    ):
        with pytest.raises(UsageError, match="sequence_length: 32 tokens, the model takes at most 16"):
            tokens_of()


def test_an_unknown_sampling_is_refused(tiny_tokenizer: Any, source: TextSource) -> None:
    with pytest.raises(UsageError, match="did you mean 'pack'"):
        calibrate(tiny_tokenizer, source, sampling="packed")


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    tokens = TokenSet(np.array([[1, 127]]))
    check_vocabulary(tokens, 128)
    with pytest.raises(UsageError, match="token 127 .* 127 embeddings"):
        check_vocabulary(tokens, 127)


class TestTokenSet:
    def test_the_hash_tells_content_and_shape_only(self) -> None:
        ids = np.arange(12).reshape(3, 4)
        hashes = {
            TokenSet(ids).content_hash,
            TokenSet(np.asfortranarray(ids).astype(np.int32), TextSource("x")).content_hash,
        }
        assert len(hashes) == 1
        assert TokenSet(ids.reshape(4, 3)).content_hash not in hashes
        assert TokenSet(ids[:, ::-1]).content_hash not in hashes

    def test_ids_cannot_be_changed(self) -> None:
        ids = np.arange(12).reshape(3, 4)
        tokens = TokenSet(ids)
        ids[0, 0] = 99
        assert tokens.input_ids[0, 0] == 0
        with pytest.raises(ValueError, match="read-only"):
            tokens.input_ids[0, 0] = 1


class TestLoadTokenizer:
    def test_of_a_model_folder(self, tiny_llama: Path) -> None:
        assert load_tokenizer(tiny_llama)("mi no")["input_ids"][0] == 1

    def test_a_folder_without_one_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(UsageError, match="no tokenizer in"):
            load_tokenizer(tmp_path)

    def test_a_missing_folder_or_id_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no such folder"):
            load_tokenizer(tmp_path / "nowhere")
        with pytest.raises(UsageError, match="cannot load the tokenizer of nobody/nothing-here"):
            load_tokenizer("nobody/nothing-here")
        with pytest.raises(UsageError, match="did you mean 'builtin:pystdlib'"):
            load_tokenizer("builtin:pystdlip")


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("tokenizer_config.json", "model_max_length", "x"),
        ("tokenizer_config.json", "bos_token", []),
        ("tokenizer_config.json", "auto_map", 5),
        ("tokenizer.json", "model", {"type": "BPE", "vocab": {"a": False}, "merges": []}),
        ("tokenizer.json", "model", {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}),
    ],
)
def test_a_damaged_tokenizer_is_refused_by_name(tiny_llama, tmp_path, source, file, field, value):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    fields = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(fields | {field: value}))
    with pytest.raises(UsageError, match="tokenizer of .*model"):
        calibrate(load_tokenizer(folder), source)


def test_a_token_that_no_tokenizer_has_is_refused_with_its_row(tiny_tokenizer, tmp_path):
    rows = pa.array([[1] * LENGTH, [2**64 - 1] * LENGTH], pa.list_(pa.uint64()))
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match="row 1 of .* has the token 18446744073709551615"):
        calibrate(tiny_tokenizer, TextSource(str(tmp_path / "rows.parquet")), num_samples=2)


def test_a_folder_of_token_rows_and_texts_is_refused_by_the_file(tiny_tokenizer, tmp_path):
    write_rows(tmp_path / "a.parquet", [32] * 3)
    pq.write_table(pa.table({"text": ["words"] * 9}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"no column 'input_ids' in .*b\.parquet"):
        calibrate(tiny_tokenizer, TextSource(str(tmp_path)), num_samples=5)


class Mute:
    """Gives no token but, where it has one, BOS."""

    name_or_path = "mute"

    def __init__(self, bos_token_id: int | None) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        ids = [self.bos_token_id] if self.bos_token_id is not None and add_special_tokens else []
        return {"input_ids": ids if isinstance(text, str) else [ids] * len(text)}


@pytest.mark.parametrize("bos", [None, 1])
def test_a_tokenizer_that_gives_nothing_is_named(source: TextSource, bos: int | None) -> None:
    mute = Mute(bos)
    for tokens_of in (
        lambda: calibrate(mute, source),
        lambda: calibrate(mute, source, sampling="document"),
        lambda: validation_tokens(mute, source, samples=1, sequence_length=32, seed=0),
        lambda: evaluation_tokens(mute, source, sequence_length=32),
    ):
        with pytest.raises(UsageError, match="tokenizer of mute gives no token for [0-9,]+ characters"):
            tokens_of()
