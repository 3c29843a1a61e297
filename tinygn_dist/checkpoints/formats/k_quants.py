"""Q4_K and Q6_K blocks of llama.cpp, from a weight or from codes that a solver chose.

A super-block is 256 consecutive inputs of a row. Q4_K: eight groups of 32, value = d * scale * code - dmin * minimum,
code 0 to 15, scale and minimum 0 to 63, d and dmin fp16. Q6_K: sixteen groups of 16, value = d * scale * code, code -32
to 31, scale int8, d fp16. The package `gguf` reads both and writes neither. Layout: ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SUPER_BLOCK = 256
_WIDTHS_TRIED = tuple(1 - 0.02 * step for step in range(-2, 13))
"""ranges of a group, as fractions of the one that clips nothing"""
_ROWS_AT_ONCE = 1 << 20
"""values that are quantised at a time"""


class Q4KCodes(NamedTuple):
    """Of n super-blocks."""

    codes: torch.Tensor
    """(n, 8, 32) integers 0 to 15"""
    scale: torch.Tensor
    """(n, 8) integers 0 to 63"""
    minimum: torch.Tensor
    """(n, 8) integers 0 to 63, subtracted"""
    d: torch.Tensor
    """(n,) fp16"""
    dmin: torch.Tensor
    """(n,) fp16"""

    def values(self) -> torch.Tensor:
        """(n, 256) fp32."""
        step = (self.d.float()[:, None] * self.scale)[..., None]
        return (step * self.codes - (self.dmin.float()[:, None] * self.minimum)[..., None]).flatten(1)


class Q6KCodes(NamedTuple):
    """Of n super-blocks."""

    codes: torch.Tensor
    """(n, 16, 16) integers -32 to 31"""
    scale: torch.Tensor
    """(n, 16) integers -128 to 127"""
    d: torch.Tensor
    """(n,) fp16"""

    def values(self) -> torch.Tensor:
        """(n, 256) fp32."""
        return ((self.d.float()[:, None] * self.scale)[..., None] * self.codes).flatten(1)


def pack_q4_k(chosen: Q4KCodes) -> torch.Tensor:
    """(n, 144) bytes."""
    scale, minimum = chosen.scale.to(torch.uint8), chosen.minimum.to(torch.uint8)
    first = scale[:, :4] | (scale[:, 4:] >> 4) << 6
    second = minimum[:, :4] | (minimum[:, 4:] >> 4) << 6
    third = scale[:, 4:] & 15 | (minimum[:, 4:] & 15) << 4
    pairs = chosen.codes.to(torch.uint8).view(-1, 4, 2, 32)
    nibbles = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return torch.cat([_half(chosen.d), _half(chosen.dmin), first, second, third, nibbles.flatten(1)], 1)


def pack_q6_k(chosen: Q6KCodes) -> torch.Tensor:
    """(n, 210) bytes."""
    quarters = (chosen.codes + 32).to(torch.uint8).view(-1, 2, 4, 32)  # halves of 128, four runs of 32 in each
    low, high = quarters & 15, quarters >> 4
    lows = torch.cat([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], 2)
    highs = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    scale = chosen.scale.to(torch.int8).view(torch.uint8)
    return torch.cat([lows.flatten(1), highs.flatten(1), scale, _half(chosen.d)], 1)


def q4_k(weight: torch.Tensor) -> torch.Tensor:
    """(out, in / 256 * 144) bytes of a weight (out, in) whose rows are whole super-blocks."""
    blocks = weight.float().reshape(-1, SUPER_BLOCK).split(_ROWS_AT_ONCE // SUPER_BLOCK)
    return torch.cat([pack_q4_k(choose_q4_k(some)) for some in blocks]).view(len(weight), -1)


def q6_k(weight: torch.Tensor) -> torch.Tensor:
    """(out, in / 256 * 210) bytes of a weight (out, in) whose rows are whole super-blocks."""
    blocks = weight.float().reshape(-1, SUPER_BLOCK).split(_ROWS_AT_ONCE // SUPER_BLOCK)
    return torch.cat([pack_q6_k(choose_q6_k(some)) for some in blocks]).view(len(weight), -1)


def choose_q4_k(blocks: torch.Tensor) -> Q4KCodes:
    """Scales and minima of least squared error among some ranges of each group. blocks: (n, 256) fp32."""
    groups = blocks.view(-1, 8, 32)
    lowest = groups.amin(-1).clamp(max=0)
    span = groups.amax(-1).clamp(min=0) - lowest
    best, step, minimum = torch.full_like(span, torch.inf), span / 15, -lowest
    for fraction in _WIDTHS_TRIED:
        for tried in (-lowest, -lowest * fraction):
            width = span * fraction / 15
            error = (_to_range(groups, width, tried)[1] - groups).square().sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            step, minimum = torch.where(better, width, step), torch.where(better, tried, minimum)
    d, dmin = (_fp16(one.amax(-1) / 63) for one in (step, minimum))
    scale = _divided(step, d).round().clamp(0, 63)
    least = _divided(minimum, dmin).round().clamp(0, 63)
    codes = _to_range(groups, d.float()[:, None] * scale, dmin.float()[:, None] * least)[0]
    return Q4KCodes(codes.to(torch.uint8), scale.to(torch.uint8), least.to(torch.uint8), d, dmin)


def choose_q6_k(blocks: torch.Tensor) -> Q6KCodes:
    """Scales of least squared error among some ranges of each group. blocks: (n, 256) fp32."""
    groups = blocks.view(-1, 16, 16)
    where = groups.abs().argmax(-1, keepdim=True)
    extreme = groups.gather(-1, where).squeeze(-1)  # with its sign: -32 is a code, 32 is none
    best, step = torch.full_like(extreme, torch.inf), -extreme / 32
    for fraction in _WIDTHS_TRIED:
        width = -extreme * fraction / 32
        error = (_symmetric(groups, width) * width[..., None] - groups).square().sum(-1)
        better = error < best
        best, step = torch.where(better, error, best), torch.where(better, width, step)
    d = _fp16(step.abs().amax(-1) / 127)
    scale = _divided(step, d).round().clamp(-127, 127)
    codes = _symmetric(groups, d.float()[:, None] * scale)
    return Q6KCodes(codes.to(torch.int8), scale.to(torch.int8), d)


def _to_range(groups: torch.Tensor, step: torch.Tensor, minimum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0 to 15 and their values."""
    step, minimum = step[..., None], minimum[..., None]
    codes = torch.where(step > 0, (groups + minimum) / step, 0.0).round().clamp(0, 15)
    return codes, codes * step - minimum


def _symmetric(groups: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    step = step[..., None]
    return torch.where(step != 0, groups / step, 0.0).round().clamp(-32, 31)


def _divided(steps: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    by = d.float()[:, None]
    return torch.where(by > 0, steps / by, 0.0)


def _fp16(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.clamp(max=torch.finfo(torch.float16).max).half()


def _half(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.half().contiguous().view(torch.uint8).view(-1, 2)
