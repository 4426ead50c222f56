"""Tensors on storage: they come back as they were, and what is damaged is refused."""

from __future__ import annotations

import resource

import pytest
import torch

from raysweep.errors import RaysweepError, StorageError
from raysweep.model.block_files import read_tensors, write_tensors

TENSORS = {
    "float32": torch.randn(3, 5),
    "bfloat16": torch.randn(4, 2).bfloat16(),
    "uint8": torch.ones(7, dtype=torch.uint8),
    "one number": torch.tensor(2.5),
    "none": torch.empty(0, 4),
    "bool": torch.tensor([True, False]),
    "int64": torch.arange(3),
    "not contiguous": torch.randn(4, 6).T,
}


@pytest.mark.parametrize("survives_crashes", [True, False])
def test_tensors_come_back_as_they_were(tmp_path, survives_crashes):
    file = tmp_path / "folder" / "unit.safetensors"
    write_tensors(file, TENSORS, {"row": {"loss": 0.5}}, survives_crashes)
    tensors, about = read_tensors(file)
    assert about == {"row": {"loss": 0.5}}
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_tensors_that_share_or_are_part_of_a_storage(tmp_path):
    whole = torch.randn(6, 4)
    tensors = {"whole": whole, "again": whole.view(4, 6), "rows": whole[2:4], "column": whole[:, 1]}
    write_tensors(tmp_path / "unit.safetensors", tensors)
    read, _ = read_tensors(tmp_path / "unit.safetensors")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_what_finds_no_room_leaves_what_was_there(tmp_path):
    file = tmp_path / "unit.safetensors"
    write_tensors(file, TENSORS, {"row": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(StorageError, match="unit.safetensors cannot be written"):
            write_tensors(file, {"large": torch.zeros(1 << 18)}, {"row": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_tensors(file)[1] == {"row": 1}
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("place", ["length", "header", "name", "about", "tensors", "end"])
def test_one_wrong_byte_is_seen(tmp_path, place):
    file = tmp_path / "unit.safetensors"
    write_tensors(file, TENSORS, {"row": "a word"})
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    at = {
        "length": 1,
        "header": 12,
        "name": content.index(next(iter(TENSORS)).encode()),
        "about": content.index(b"a word"),
        "tensors": header + 3,
        "end": len(content) - 1,
    }
    content[at[place]] ^= 1
    file.write_bytes(content)
    with pytest.raises(RaysweepError, match="cannot be read"):
        read_tensors(file)


def test_zeros_in_place_of_the_end_are_seen(tmp_path):
    """As a crash of the machine may leave them."""
    file = tmp_path / "unit.safetensors"
    write_tensors(file, TENSORS, survives_crashes=False)
    content = file.read_bytes()
    file.write_bytes(content[:-40] + bytes(40))
    with pytest.raises(RaysweepError, match="checksum"):
        read_tensors(file)
