"""Masks as bits: the same mask comes back, and both devices mean the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysweep.pruning.packed_mask import PackedMask, packed, unpacked

CPU = torch.device("cpu")
DEVICES = [CPU] + [torch.device("cuda", 0)] * torch.cuda.is_available()


def mask(outputs: int, inputs: int, seed: int) -> torch.Tensor:
    return torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(outputs=st.integers(1, 9), inputs=st.integers(1, 40), seed=st.integers(0, 99))
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_mask_comes_back_as_it_was(device, outputs, inputs, seed):
    mask_OI = mask(outputs, inputs, seed)
    found = PackedMask.of(mask_OI.to(device))
    assert found.bits.nbytes == -(-outputs * inputs // 8)
    assert found.numel() == outputs * inputs
    for there in DEVICES:
        again = found.on(there)
        assert again.dtype == torch.bool
        assert again.device == there
        assert torch.equal(again.cpu(), mask_OI)


@given(count=st.integers(1, 99), seed=st.integers(0, 99))
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_bits_are_those_of_numpy_on_every_device(device, count, seed):
    flat = mask(1, count, seed)[0]
    bits = packed(flat.to(device))
    assert np.array_equal(bits.cpu().numpy(), np.packbits(flat.numpy()))
    assert torch.equal(unpacked(bits, count).bool().cpu(), flat)


def test_columns_of_a_transposed_mask_keep_their_places():
    mask_OI = mask(24, 5, 0).T
    assert not mask_OI.is_contiguous()
    assert torch.equal(PackedMask.of(mask_OI).on(CPU), mask_OI)


def test_what_is_made_of_a_mask_leaves_it_as_it_is():
    mask_OI = mask(4, 16, 0)
    kept = PackedMask.of(mask_OI)
    kept.on(CPU).fill_(False)
    assert torch.equal(kept.moved(torch.clone).on(CPU), mask_OI)
