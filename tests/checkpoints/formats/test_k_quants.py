"""Q4_K and Q6_K: what is packed is what the package `gguf` unpacks, and the error is that of so many bits."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Number

from tinygn_dist.checkpoints.formats import k_quants


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def unpacked(packed: torch.Tensor, number: Number) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(packed.numpy(), number).copy())


def test_any_q4_k_codes_come_back_as_they_are():
    drawn = torch.Generator().manual_seed(1)
    codes = k_quants.Q4KCodes(
        torch.randint(0, 16, (5, 8, 32), generator=drawn),
        torch.randint(0, 64, (5, 8), generator=drawn),
        torch.randint(0, 64, (5, 8), generator=drawn),
        torch.rand(5, generator=drawn).half(),
        torch.rand(5, generator=drawn).half(),
    )
    packed = k_quants.pack_q4_k(codes)
    assert packed.shape == (5, 144) and packed.dtype == torch.uint8
    assert torch.equal(unpacked(packed, Number.Q4_K), codes.values())


def test_any_q6_k_codes_come_back_as_they_are():
    drawn = torch.Generator().manual_seed(2)
    codes = k_quants.Q6KCodes(
        torch.randint(-32, 32, (5, 16, 16), generator=drawn),
        torch.randint(-128, 128, (5, 16), generator=drawn),
        torch.rand(5, generator=drawn).half(),
    )
    packed = k_quants.pack_q6_k(codes)
    assert packed.shape == (5, 210)
    assert torch.equal(unpacked(packed, Number.Q6_K), codes.values())


@pytest.mark.parametrize(
    ("encode", "number", "plain"), [(k_quants.q4_k, Number.Q4_K, Number.Q4_1), (k_quants.q6_k, Number.Q6_K, None)]
)
def test_the_error_is_that_of_the_bits(encode, number, plain):
    weight = noise(48, 512)
    error = (unpacked(encode(weight), number) - weight).square().mean()
    if plain is not None:  # at fewer bits than Q4_1, which has an fp16 scale and minimum for 32 values
        coarse = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), plain), plain))
        assert error < (coarse - weight).square().mean()
    else:  # 16 normal values span about 3.6 standard deviations: steps of 3.6 / 64, error step^2 / 12
        assert error < 1.3 * (3.6 / 64) ** 2 / 12


@pytest.mark.parametrize(("encode", "number"), [(k_quants.q4_k, Number.Q4_K), (k_quants.q6_k, Number.Q6_K)])
def test_zeros_and_one_large_value(encode, number):
    weight = torch.zeros(2, 256)
    assert torch.equal(unpacked(encode(weight), number), weight)
    weight[1, 37] = -3.0
    found = unpacked(encode(weight), number)
    assert torch.equal(found[0], weight[0])
    torch.testing.assert_close(found[1, 37], weight[1, 37], rtol=0.01, atol=0)
    assert found[1].count_nonzero() == 1
