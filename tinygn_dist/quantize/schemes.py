"""What can a scheme of quantisation be? One row each: its grid, what engines do to activations, which format stores
it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tinygn_dist.config.quantize import QuantizeConfig, SchemeName
from tinygn_dist.errors import UserError
from tinygn_dist.maths.grids import Grid
from tinygn_dist.models.anatomy import Matrix

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Scheme:
    """bits, kind: of the weights. activations: what engines round a layer's inputs to, token by token. packed: the name
    that compressed-tensors has for files of it. group_size, symmetric: where the options do not say, None: one scale
    for a row."""

    bits: int
    packed: Literal["pack-quantized", "int-quantized", "float-quantized"]
    kind: Literal["int", "float"] = "int"
    activations: Literal["int8", "fp8"] | None = None
    group_size: int | None = None
    symmetric: bool = True


SCHEMES: dict[SchemeName, Scheme] = {
    "int8": Scheme(8, "pack-quantized"),
    "int8-dynamic": Scheme(8, "int-quantized", activations="int8"),
    "int4": Scheme(4, "pack-quantized", group_size=64, symmetric=False),
    "int3": Scheme(3, "pack-quantized", group_size=64, symmetric=False),
    "int2": Scheme(2, "pack-quantized", group_size=64, symmetric=False),
    "fp8": Scheme(8, "float-quantized", "float"),
    "fp8-dynamic": Scheme(8, "float-quantized", "float", activations="fp8"),
}


def grid_of(options: QuantizeConfig) -> Grid:
    """The grid that is asked for."""
    scheme = SCHEMES[options.scheme]
    group_size = scheme.group_size if options.group_size is None else options.group_size or None
    symmetric = scheme.symmetric if options.symmetric is None else options.symmetric
    return Grid(scheme.bits, symmetric, group_size, scheme.kind)


def check_groups(matrices: Sequence[Matrix], grid: Grid) -> None:
    """UserError naming the first matrix whose rows are not whole groups, and the nearest group size that all rows
    are."""
    if grid.group_size is None:
        return
    odd = [matrix for matrix in matrices if matrix.shape[1] % grid.group_size]
    if not odd:
        return
    common = math.gcd(*(matrix.shape[1] for matrix in matrices))
    fitting = [size for size in GROUP_SIZES if common % size == 0]
    nearest = min(fitting, key=lambda size: abs(size - grid.group_size), default=0)
    told = f"{nearest}{'' if nearest else ', one scale for each row'}"
    raise UserError(
        f"quantize.group_size {grid.group_size}: rows of {odd[0].name} have {odd[0].shape[1]} inputs, no whole groups; "
        f"the nearest size that fits all {len(matrices)} weights is {told}"
    )


def bits_per_weight(grid: Grid, num_inputs: int, scale_bits: int) -> float:
    """Stored for each weight of a row, its scales and zero points counted."""
    per_group = scale_bits + (0 if grid.symmetric else grid.bits)
    return grid.bits + per_group / grid.width_of_group(num_inputs)
