"""Blocks of 32 of llama.cpp from codes that a solver chose: nothing is rounded a second time.

Q4_0, Q5_0 and Q8_0 hold fp16 scale and code; Q4_1 and Q5_1 hold fp16 scale, fp16 minimum and a code from 0. Layout:
ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from tinygn_dist.maths.grids import Quantised

BLOCK = 32


class BlockCodes(NamedTuple):
    """bits of a code; whether a block has a minimum beside its scale."""

    bits: int
    has_minimum: bool


BLOCKS: Mapping[str, BlockCodes] = {  # Q4_0 before Q5_0: the first that holds all codes is the smallest
    "Q4_0": BlockCodes(4, has_minimum=False),
    "Q4_1": BlockCodes(4, has_minimum=True),
    "Q5_0": BlockCodes(5, has_minimum=False),
    "Q5_1": BlockCodes(5, has_minimum=True),
    "Q8_0": BlockCodes(8, has_minimum=False),
}


def type_of_codes(found: Quantised) -> str | None:
    """The smallest type whose blocks hold these codes as they are. None: groups are no multiple of 32 inputs, codes are
    fp8, or scales are no fp16 numbers."""
    num_inputs, groups = found.codes.shape[1], found.scale.shape[1]
    if found.codes.dtype != torch.int8 or num_inputs // groups % BLOCK or num_inputs % groups:
        return None
    if not torch.equal(found.scale.half().float(), found.scale):
        return None
    low, high = (int(extreme) for extreme in found.codes.aminmax())
    has_zero_points = bool(found.zero_point.any())
    for name, block in BLOCKS.items():
        half = 2 ** (block.bits - 1)
        if block.has_minimum == has_zero_points and -half <= low and high < half:
            return name
    return None


def pack_codes(found: Quantised, name: str) -> torch.Tensor:
    """(out, bytes of a row) uint8. found: as `type_of_codes` accepts it for the type `name`. A minimum, (-2^(bits-1) -
    zero point) * scale, is rounded to fp16; everything else is exact."""
    block, rows = BLOCKS[name], len(found.codes)
    per_group = found.codes.shape[1] // found.scale.shape[1] // BLOCK
    scale = found.scale.repeat_interleave(per_group, 1).reshape(-1, 1)
    codes = found.codes.reshape(-1, BLOCK)
    made = [scale.half().view(torch.uint8)]
    if block.has_minimum:
        zero_point = found.zero_point.float().repeat_interleave(per_group, 1).reshape(-1, 1)
        made.append(((-(2 ** (block.bits - 1)) - zero_point) * scale).half().view(torch.uint8))
    if block.bits == 8:
        return torch.cat([*made, codes.view(torch.uint8)], 1).view(rows, -1)
    unsigned = (codes.to(torch.int16) + 2 ** (block.bits - 1)).to(torch.uint8)
    if block.bits == 5:
        high = (unsigned >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.uint8)
        made.append(high.sum(-1, dtype=torch.uint8))
    low = unsigned & 15
    return torch.cat([*made, low[:, :16] | low[:, 16:] << 4], 1).view(rows, -1)
