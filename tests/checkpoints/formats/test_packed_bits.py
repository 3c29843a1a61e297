"""Packing against the definition, bit by bit."""

import pytest
import torch

from tinygn_dist.checkpoints.formats.packed_bits import pack, unpack


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 50, 96])
def test_code_i_starts_at_bit_i_times_bits_and_comes_back(bits: int, count: int):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.randint(low, high + 1, (3, count), generator=torch.Generator().manual_seed(bits)).to(torch.int8)
    codes[0], codes[1] = low, high
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (3, -(-count * bits // 32))
    for row in range(3):
        whole = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words[row]))
        for i in range(count):
            assert (whole >> (i * bits)) & (2**bits - 1) == int(codes[row, i]) - low
    assert torch.equal(unpack(words, bits, count), codes)
