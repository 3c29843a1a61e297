"""Codes that a solver chose go into blocks of llama.cpp unchanged."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Number

from tinygn_dist.checkpoints.formats.gguf_codes import pack_codes, type_of_codes
from tinygn_dist.maths.grids import Quantised


def codes_of(bits: int, group: int, zero_point: int = 0) -> Quantised:
    drawn = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 128), generator=drawn).to(torch.int8)
    scale = (torch.rand(6, 128 // group, generator=drawn) + 0.1).half().float()
    return Quantised(codes, scale, torch.full_like(scale, zero_point).to(torch.int8))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("bits", "name"), [(2, "Q4_0"), (4, "Q4_0"), (5, "Q5_0"), (6, "Q8_0"), (8, "Q8_0")])
def test_symmetric_codes_are_the_values_of_the_file(bits: int, name: str, group: int):
    found = codes_of(bits, group)
    assert type_of_codes(found) == name
    values = gguf.dequantize(pack_codes(found, name).numpy(), Number[name])
    assert torch.equal(torch.from_numpy(values), found.values())


@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_1"), (5, "Q5_1")])
def test_zero_points_become_minima_in_fp16(bits: int, name: str):
    found = codes_of(bits, 32, zero_point=3)
    assert type_of_codes(found) == name
    values = torch.from_numpy(gguf.dequantize(pack_codes(found, name).numpy(), Number[name]))
    least = (2 ** (bits - 1) + 3) * found.scale.max()
    torch.testing.assert_close(values, found.values(), rtol=0, atol=float(least) * 2**-11)


def test_codes_that_no_block_holds():
    assert type_of_codes(codes_of(4, 16)) is None
    assert type_of_codes(codes_of(8, 32, zero_point=1)) is None
    wide = codes_of(4, 32)
    assert type_of_codes(wide._replace(scale=wide.scale / 3)) is None
    assert type_of_codes(wide._replace(codes=wide.codes.to(torch.float8_e4m3fn))) is None
