"""Zeros by bits, against what masked_fill and a loop over elements say."""

from __future__ import annotations

import pytest
import torch

from tinygn_dist.maths.bit_zeros import checksum, keep_only_, num_nonzero

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SIZES = [(0,), (7, 3), (513, 600)]  # the last is more than two chunks


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """With everything a float can be."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    special = [torch.nan, torch.inf, -torch.inf, -0.0, torch.finfo(dtype).tiny, -1.0]
    made.view(-1)[: len(special)] = torch.tensor(special, dtype=dtype)[: made.numel()]
    return made


def mask(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "transposed"])
def test_what_is_kept_keeps_its_bits_and_the_rest_is_plus_zero(
    shape: tuple[int, ...], dtype: torch.dtype, turned: bool
):
    weight, keep = values(shape, dtype), mask(shape)
    if turned:
        weight, keep = weight.t() if weight.dim() == 2 else weight, keep.t() if keep.dim() == 2 else keep
    wanted = weight.masked_fill(~keep, 0).contiguous()
    keep_only_(weight, keep)
    as_bytes = [t.contiguous().view(torch.uint8) for t in (weight, wanted)]
    assert torch.equal(*as_bytes)


def test_a_parameter_in_grad_mode_is_edited_in_place():
    parameter = torch.nn.Parameter(torch.full((4,), torch.nan))
    keep_only_(parameter, torch.tensor([False] * 4))
    assert parameter.detach().tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_wrong_element_is_found(dtype: torch.dtype):
    shape = SIZES[-1]
    keep = mask(shape)
    clean = values(shape, dtype).masked_fill_(~keep, 0)
    assert num_nonzero(clean, keep) == 0
    dropped = (~keep).view(-1).nonzero().squeeze(1)
    for place in (dropped[0], dropped[len(dropped) // 2], dropped[-1]):
        for wrong in (torch.finfo(dtype).tiny, -1.0, torch.nan):
            dirty = clean.clone()
            dirty.view(-1)[place] = wrong
            assert num_nonzero(dirty, keep) == 1
            assert checksum(dirty) != checksum(clean) == checksum(clean.clone())
    dirty = clean.clone()
    dirty.view(-1)[dropped[:3]] = torch.tensor([-0.0, 2.0, torch.nan], dtype=dtype)
    assert num_nonzero(dirty, keep) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksums_of_pieces_that_do_not_fill_whole_words(dtype: torch.dtype):
    """A shard may begin and end anywhere in its flat storage."""
    flat = torch.ones(23, dtype=dtype)
    for low, high in ((0, 23), (1, 9), (3, 3), (2, 22), (1, 2)):
        piece = flat[low:high]
        before = checksum(piece)
        if high > low:
            piece[-1] = 2
            assert checksum(piece) != before
            piece[-1] = 1
        assert checksum(piece) == before
