"""Documents from every kind of source, and the refusals that name what is wrong."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysweep.errors import UsageError
from raysweep.model.text import TextSource, load_documents

DOCUMENTS = ["first line\nsecond line", "", "umlauts: äöü", "last"]


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(source: TextSource) -> str:
    with pytest.raises(UsageError) as caught:
        list(load_documents(source))
    return caught.value.message


def test_parquet_and_jsonl_give_the_documents_in_order(tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "a.parquet", id=[1, 2, 3, 4], text=DOCUMENTS)
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": document} for document in DOCUMENTS])
    assert list(load_documents(TextSource(str(parquet)))) == DOCUMENTS
    assert list(load_documents(TextSource(str(jsonl)))) == DOCUMENTS


def test_a_text_file_is_one_document_whatever_the_split(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n\ntwo ä\n", encoding="utf-8")
    assert list(load_documents(TextSource(str(path), split="test"))) == ["one\n\ntwo ä\n"]


def test_a_file_has_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(UsageError, match="is a file here, and config and data_files"):
        list(load_documents(TextSource(str(tmp_path / "notes.txt"), config="x")))


def test_null_rows_are_left_out(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["one", None, "two"])
    assert list(load_documents(TextSource(str(path)))) == ["one", "two"]


def test_a_folder_is_read_split_by_split_in_order_of_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00001-of-00002.parquet", text=["b"])
    write_parquet(tmp_path / "train-00000-of-00002.parquet", text=["a"])
    write_parquet(tmp_path / "data" / "test" / "part.parquet", text=["c"])
    write_parquet(tmp_path / "trainer.parquet", text=["d"])
    (tmp_path / "LICENSE.txt").write_text("not a document")
    assert list(load_documents(TextSource(str(tmp_path)))) == ["a", "b", "d"]
    assert list(load_documents(TextSource(str(tmp_path), split="test"))) == ["c"]


def test_files_without_a_split_in_their_names_are_the_training_split(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    assert list(load_documents(TextSource(str(tmp_path)))) == ["a", "b"]


def test_reading_stops_once_there_are_enough_characters(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "12345"}] * 3)
    with path.open("a") as file:
        file.write("this line is broken and is never read\n")
    assert list(load_documents(TextSource(str(path)), characters=11)) == ["12345"] * 3
    assert list(load_documents(TextSource(str(path)), characters=10)) == ["12345"] * 2


def test_an_unknown_split_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", text=["a"])
    write_parquet(tmp_path / "validation.parquet", text=["b"])
    message = refusal(TextSource(str(tmp_path), split="validaton"))
    assert "no split 'validaton'" in message
    assert "did you mean 'validation'?" in message
    assert "train, validation" in message


def test_a_missing_text_column_is_refused_with_the_columns_that_exist(tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "a.parquet", content=["a"], label=[1])
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"content": "a", "label": 1}])
    for path in (parquet, jsonl):
        message = refusal(TextSource(str(path)))
        assert "no column 'text'" in message
        assert "content, label" in message


@pytest.mark.parametrize("name", ["nowhere/a.parquet", "./nowhere", "two/many/slashes", "~/no such folder"])
def test_a_missing_path_is_refused(name: str) -> None:
    assert f"no such file or folder: {name}" in refusal(TextSource(name))


@pytest.mark.parametrize("name", ["./a\0b.txt", f"./{'x' * 5000}.txt", "~nobody_at_all/x.txt"])
def test_what_can_be_no_path_is_refused(name: str) -> None:
    assert "is no path that can be used here" in refusal(TextSource(name))


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1"))
    (tmp_path / "half.jsonl").write_text('{"text": "ab\\ud800"}')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "table.csv").write_text("text\na\n")
    write_parquet(tmp_path / "numbers.parquet", text=[1, 2])
    expected = {
        "broken.parquet": "as Parquet",
        "broken.jsonl": "broken.jsonl:2: not a line of JSON",
        "latin.txt": "is not UTF-8",
        "half.jsonl": "half.jsonl:1: half a character, '\\ud800', at place 2",
        "deep.jsonl": "deep.jsonl:1: not a line of JSON",
        "table.csv": ".parquet, .jsonl, .txt",
        "numbers.parquet": "holds int, not text",
    }
    for name, part in expected.items():
        assert part in refusal(TextSource(str(tmp_path / name)))


def damage_pages(path: Path) -> Path:
    """Overwrites data pages behind the file's first bytes; its footer stays whole, so that it opens."""
    content = bytearray(path.read_bytes())
    content[40:400] = b"\xff" * 360
    path.write_bytes(content)
    return path


def test_a_bad_line_behind_good_ones_and_damaged_pages_are_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "fine"}\n' * 9999 + '{"text": "ä"}\n'.encode("latin-1"))
    damaged = damage_pages(
        write_parquet(tmp_path / "damaged.parquet", text=[f"word {k}" for k in range(999)])
    )
    assert pq.ParquetFile(damaged).metadata.num_rows == 999
    assert f"{latin} is not UTF-8" in refusal(TextSource(str(latin)))
    assert f"cannot read {damaged}" in refusal(TextSource(str(damaged)))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_what_may_not_be_opened_is_refused(tmp_path: Path, name: str) -> None:
    os.mknod(tmp_path / name, stat.S_IFSOCK | 0o600)  # not even root opens a socket as a file
    assert f"cannot read {tmp_path / name}" in refusal(TextSource(str(tmp_path / name)))


def test_empty_data_are_refused(tmp_path: Path) -> None:
    blank = write_parquet(tmp_path / "blank.parquet", text=["", "\n", None])
    empty = write_parquet(tmp_path / "empty.parquet", text=pa.array([], pa.string()))
    (tmp_path / "nothing").mkdir()
    assert "no text in" in refusal(TextSource(str(blank)))
    assert "no text in" in refusal(TextSource(str(empty)))
    assert "no .parquet, .jsonl, .txt file" in refusal(TextSource(str(tmp_path / "nothing")))


def test_the_built_in_text_has_three_splits_that_share_no_document() -> None:
    splits = [
        set(load_documents(TextSource("builtin:pystdlib", split=split)))
        for split in ("train", "validation", "test")
    ]
    assert all(splits)
    assert sum(map(len, splits)) == len(set.union(*splits))
    assert "allowed: test, train, validation" in refusal(TextSource("builtin:pystdlib", split="all"))


def test_an_unknown_built_in_is_refused_with_the_nearest() -> None:
    message = refusal(TextSource("builtin:pystdlb"))
    assert "did you mean 'builtin:pystdlib'?" in message


class TestHuggingFaceDataSets:
    """The `datasets` library, on local files: the same path as for an id on the hub."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_jsonl(tmp_path / "one.jsonl", [{"text": "a"}, {"text": "b"}])
        write_jsonl(tmp_path / "two.jsonl", [{"text": "c"}])
        return tmp_path

    def test_data_files_name_the_files_of_a_split(self, folder: Path) -> None:
        source = TextSource(str(folder), data_files={"train": "one.jsonl", "heldout": ["two.jsonl"]})
        assert list(load_documents(source)) == ["a", "b"]
        held_out = TextSource(source.dataset, data_files=source.data_files, split="heldout")
        assert list(load_documents(held_out)) == ["c"]

    def test_an_unknown_split_is_refused_with_those_that_exist(self, folder: Path) -> None:
        message = refusal(TextSource(str(folder), data_files="*.jsonl", split="test"))
        assert "no split 'test'" in message
        assert "allowed: train" in message

    def test_a_missing_text_column_is_refused(self, folder: Path) -> None:
        write_jsonl(folder / "three.jsonl", [{"body": "a"}])
        assert "its columns: body" in refusal(TextSource(str(folder), data_files="three.jsonl"))

    def test_an_unreachable_data_set_is_refused_in_a_few_lines(self) -> None:
        message = refusal(TextSource("nobody/nothing-here", config="en"))
        assert message.startswith("dataset: cannot load nobody/nothing-here/en (split train)")
        assert "HF_TOKEN" in message
        assert len(message.splitlines()) == 2
