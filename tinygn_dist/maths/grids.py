"""Which values may a quantised weight take? Grids of integers and of fp8, with a scale (and a zero point) for each
group.

A value is (code - zero point) * scale. Codes of `bits` bits are signed, from -2^(bits-1) to 2^(bits-1) - 1; those of
fp8 are the numbers of float8_e4m3fn. A group is so many consecutive inputs of one row. Zero points are integers within
the codes, so zero is a value of every grid: a pruned weight stays zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

FLOAT8 = torch.float8_e4m3fn
SHRUNKEN = tuple(1 - 0.025 * step for step in range(25))
"""ranges that are tried, as fractions of the one that clips nothing"""


@dataclass(frozen=True)
class Grid:
    """bits: 2 to 8. group_size: inputs that share a scale, None for a whole row. kind float: fp8 e4m3, symmetric."""

    bits: int
    symmetric: bool = True
    group_size: int | None = None
    kind: Literal["int", "float"] = "int"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"{self.bits} bits, accepted: 2 to 8")
        if self.kind == "float" and (self.bits != 8 or not self.symmetric):
            raise ValueError("a float grid has 8 bits and is symmetric")

    @property
    def low(self) -> float:
        return torch.finfo(FLOAT8).min if self.kind == "float" else -(2 ** (self.bits - 1))

    @property
    def high(self) -> float:
        return torch.finfo(FLOAT8).max if self.kind == "float" else 2 ** (self.bits - 1) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        return FLOAT8 if self.kind == "float" else torch.int8

    def width_of_group(self, num_inputs: int) -> int:
        """Inputs of each group of a row. ValueError where they do not fill whole groups."""
        width = self.group_size or num_inputs
        if num_inputs % width:
            raise ValueError(f"{num_inputs} inputs are not whole groups of {width}")
        return width

    def nearest(self, codes: torch.Tensor) -> torch.Tensor:
        """fp32 numbers rounded to codes, in place for integers; still fp32."""
        if self.kind == "float":
            return codes.clamp_(self.low, self.high).to(FLOAT8).float()
        return codes.round_().clamp_(self.low, self.high)

    def numbers(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes of this grid as int64 from 0 to 255."""
        if self.kind == "float":
            return codes.to(FLOAT8).view(torch.uint8).long()
        return codes.long() + 128


class Scales(NamedTuple):
    """Of every group of a matrix."""

    scale: torch.Tensor
    """(out, groups) fp32, positive, each a number of the dtype it will be stored in"""
    zero_point: torch.Tensor
    """(out, groups) fp32 whole numbers, 0 on a symmetric grid"""

    def of_columns(self, num_inputs: int) -> Scales:
        """The same for every column, (out, in)."""
        width = num_inputs // self.scale.shape[1]
        return Scales(self.scale.repeat_interleave(width, 1), self.zero_point.repeat_interleave(width, 1))


class Quantised(NamedTuple):
    """A matrix on a grid."""

    codes: torch.Tensor
    """(out, in) int8, or float8_e4m3fn"""
    scale: torch.Tensor
    """(out, groups) fp32, each a number of the dtype it will be stored in"""
    zero_point: torch.Tensor
    """(out, groups) int8"""

    def scales(self) -> Scales:
        return Scales(self.scale, self.zero_point.float())

    def values(self) -> torch.Tensor:
        """(out, in) fp32."""
        codes, groups = self.codes.float(), self.scale.shape[1]
        by_group = codes.view(len(codes), groups, -1) - self.zero_point.float()[..., None]
        return (by_group * self.scale[..., None]).view_as(codes)


def quantised(codes: torch.Tensor, scales: Scales, grid: Grid) -> Quantised:
    """codes: (out, in) fp32 numbers of the grid."""
    return Quantised(codes.to(grid.code_dtype), scales.scale, scales.zero_point.to(torch.int8))


def to_nearest(weight: torch.Tensor, scales: Scales, grid: Grid) -> torch.Tensor:
    """(out, in) fp32 codes of the values nearest to a weight."""
    scale, zero_point = scales.of_columns(weight.shape[1])
    return grid.nearest(weight.float() / scale + zero_point)


def stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 scales as they come back from a file in `dtype`, none so small that it would be zero or divide badly
    there."""
    return scale.clamp(min=torch.finfo(dtype).tiny, max=torch.finfo(dtype).max).to(dtype).float()


def find_scales(
    weight: torch.Tensor, importance: torch.Tensor | None, grid: Grid, dtype: torch.dtype, search: bool = True
) -> Scales:
    """Scales and zero points of a weight (out, in): of the ranges tried for each group the one with the least
    sum_j h_j (w_j - w'_j)^2 at the nearest codes.

    importance: h, (in,), the diagonal of a Hessian; 1 by default. dtype: that scales are stored in. search: else the
    range that clips nothing. Groups of zeros get scale 1. Raises ValueError for NaN or inf.
    """
    weight = weight.float()
    if not weight.isfinite().all():
        raise ValueError("the weight holds NaN or inf")
    out, num_inputs = weight.shape
    width = grid.width_of_group(num_inputs)
    groups = weight.view(out, -1, width)
    counts = torch.ones(num_inputs, device=weight.device) if importance is None else importance.float()
    counts = counts.view(-1, width)
    low, high = groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0)
    best: Scales | None = None
    least = torch.empty(0)
    for shrunken_low, shrunken_high in _ranges(grid, search):
        scales = _scales_of(low * shrunken_low, high * shrunken_high, grid, dtype)
        codes = grid.nearest(groups / scales.scale[..., None] + scales.zero_point[..., None])
        away = (codes - scales.zero_point[..., None]) * scales.scale[..., None] - groups
        error = (away.square_() * counts).sum(2)
        if best is None:
            best, least = scales, error
            continue
        better = error < least
        best = Scales(*(torch.where(better, new, old) for new, old in zip(scales, best, strict=True)))
        least = torch.minimum(error, least)
    return best


def _ranges(grid: Grid, search: bool) -> list[tuple[float, float]]:
    return [(by, by) for by in SHRUNKEN] if search else [(1.0, 1.0)]


def _scales_of(low: torch.Tensor, high: torch.Tensor, grid: Grid, dtype: torch.dtype) -> Scales:
    """Of groups whose codes are to reach from low <= 0 to high >= 0."""
    if grid.symmetric:
        scale = torch.maximum(-low, high) / grid.high
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return Scales(stored_scale(scale, dtype), torch.zeros_like(scale))
    scale = (high - low) / (grid.high - grid.low)
    scale = stored_scale(torch.where(scale > 0, scale, torch.ones_like(scale)), dtype)
    zero_point = (grid.low - low / scale).round_().clamp_(grid.low, grid.high)
    return Scales(scale, zero_point)
