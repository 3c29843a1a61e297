"""Grids against the definition, by enumeration of their values."""

import pytest
import torch

from tinygn_dist.maths.grids import Grid, find_scales, quantised, to_nearest


def values_of(grid: Grid, scale: float, zero_point: float = 0.0) -> torch.Tensor:
    """Every value of a grid, ascending."""
    if grid.kind == "float":
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        codes = codes[codes.isfinite()]
    else:
        codes = torch.arange(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1)).float()
    return ((codes - zero_point) * scale).unique()


GRIDS = [Grid(bits, symmetric, 4) for bits in (2, 3, 4, 5, 8) for symmetric in (True, False)]
GRIDS.append(Grid(8, True, 4, "float"))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nearest_codes_are_the_nearest_values_there_are(grid: Grid):
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    scales = find_scales(weight, None, grid, torch.float32)
    found = quantised(to_nearest(weight, scales, grid), scales, grid)
    assert found.codes.dtype == grid.code_dtype and found.scale.shape == (3, 2)
    for row in range(3):
        for column in range(8):
            group = column // 4
            there = values_of(grid, float(scales.scale[row, group]), float(scales.zero_point[row, group]))
            nearest = (there - weight[row, column]).abs().min()
            away = (found.values()[row, column] - weight[row, column]).abs()
            assert float(away) == pytest.approx(float(nearest), abs=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_is_a_value_and_scales_are_numbers_of_their_dtype(grid: Grid, dtype: torch.dtype):
    weight = torch.rand(5, 8, generator=torch.Generator().manual_seed(1)) + 3
    weight[0], weight[1, :4], weight[2] = 0, -2, 1e-30
    scales = find_scales(weight, torch.arange(8.0), grid, dtype)
    assert bool((scales.scale > 0).all()) and torch.equal(scales.scale, scales.scale.to(dtype).float())
    zero = quantised(to_nearest(torch.zeros_like(weight), scales, grid), scales, grid)
    assert not zero.values().any()
    found = quantised(to_nearest(weight, scales, grid), scales, grid).values()
    assert found.isfinite().all() and not found[0].any()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("value", [-0.75, 3.0])
def test_a_matrix_of_one_value_is_stored_exactly(bits: int, value: float):
    weight = torch.full((2, 8), value)
    for symmetric in (True, False):
        grid = Grid(bits, symmetric, 8)
        scales = find_scales(weight, None, grid, torch.float32)
        torch.testing.assert_close(quantised(to_nearest(weight, scales, grid), scales, grid).values(), weight)


def test_the_search_never_ends_above_the_range_that_clips_nothing_and_counts_by_importance():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    importance = torch.rand(32, generator=torch.Generator().manual_seed(3)) ** 4
    grid = Grid(3, False, 16)

    def error(scales) -> torch.Tensor:
        found = quantised(to_nearest(weight, scales, grid), scales, grid).values()
        return ((found - weight).square() * importance).view(16, 2, 16).sum(2)

    plain, searched = (error(find_scales(weight, importance, grid, torch.float32, search)) for search in (False, True))
    assert bool((searched <= plain + 1e-6).all()) and float(searched.sum()) < 0.9 * float(plain.sum())


def test_what_is_no_grid_is_refused():
    with pytest.raises(ValueError, match="9 bits, accepted: 2 to 8"):
        Grid(9)
    with pytest.raises(ValueError, match="float grid has 8 bits"):
        Grid(4, True, None, "float")
    with pytest.raises(ValueError, match="10 inputs are not whole groups of 4"):
        find_scales(torch.ones(2, 10), None, Grid(4, True, 4), torch.float32)
    with pytest.raises(ValueError, match="NaN or inf"):
        find_scales(torch.full((2, 8), float("nan")), None, Grid(4, True, 4), torch.float32)
