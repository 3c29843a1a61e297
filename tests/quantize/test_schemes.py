"""The table of schemes against the names that can be asked for, and what is refused before weights load."""

import pytest

from tinygn_dist.config import make
from tinygn_dist.config.quantize import SCHEMES as NAMES
from tinygn_dist.config.quantize import QuantizeConfig
from tinygn_dist.errors import UserError
from tinygn_dist.maths.grids import Grid
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.quantize.schemes import SCHEMES, bits_per_weight, check_groups, grid_of


def matrix(num_inputs: int, name: str = "layers.0.up.weight") -> Matrix:
    return Matrix(name, name.removesuffix(".weight"), 0, (8, num_inputs), 1)


def test_every_name_has_a_row_and_every_row_a_grid():
    assert set(SCHEMES) == set(NAMES)
    for name in NAMES:
        grid = grid_of(QuantizeConfig(scheme=name))
        assert (grid.bits, grid.kind) == (SCHEMES[name].bits, SCHEMES[name].kind)


def test_options_win_over_the_row():
    assert grid_of(QuantizeConfig(scheme="int4")) == Grid(4, False, 64)
    assert grid_of(QuantizeConfig(scheme="int4", group_size=0, symmetric=True)) == Grid(4, True, None)
    assert grid_of(QuantizeConfig(scheme="int8", group_size=32)) == Grid(8, True, 32)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"scheme": "int5"}, "int5"),
        ({"scheme": "int4", "group_size": 48}, "48"),
        ({"scheme": "fp8", "group_size": 64}, "group_size 64 with scheme fp8"),
        ({"scheme": "int8-dynamic", "symmetric": False}, "symmetric false with scheme int8-dynamic"),
        ({"scheme": "int8", "symmetric": False}, "symmetric false with scheme int8"),
        ({"scheme": "int4", "rounds": -1}, "rounds"),
    ],
)
def test_what_no_format_stores_is_refused(asked: dict, said: str):
    with pytest.raises(UserError, match=said):
        make(QuantizeConfig, asked)


def test_a_group_that_does_not_fit_is_refused_with_the_nearest_that_does():
    check_groups([matrix(128), matrix(192)], Grid(4, False, 64))
    with pytest.raises(
        UserError, match=r"rows of layers.0.up.weight have 96 inputs.* nearest size .* all 2 weights is 32"
    ):
        check_groups([matrix(128), matrix(96)], Grid(4, False, 64))
    with pytest.raises(UserError, match="is 0, one scale for each row"):
        check_groups([matrix(48)], Grid(4, False, 32))
    check_groups([matrix(50)], Grid(8))


def test_bits_count_scales_and_zero_points():
    assert bits_per_weight(Grid(4, False, 64), 256, 16) == 4 + 20 / 64
    assert bits_per_weight(Grid(3, True, 32), 256, 16) == 3.5
    assert bits_per_weight(Grid(8), 256, 32) == 8 + 32 / 256
