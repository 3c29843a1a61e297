"""The codes of a layer against brute force, the plain sweep and the definition of the error."""

import itertools

import pytest
import torch

from tinygn_dist.maths.grids import Grid, Quantised, find_scales
from tinygn_dist.maths.solve import quantise
from tinygn_dist.maths.solve.obs import damped, inverse_factor
from tinygn_dist.maths.solve.quantise import Effort

FLOAT32 = torch.float32
SWEEP_ALONE = Effort(rounds=0, descents=0)


def layer(out: int, num_inputs: int, tokens: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_inputs, num_inputs, generator=generator) / num_inputs**0.5
    inputs = torch.randn(tokens, num_inputs, generator=generator) @ (mix + torch.eye(num_inputs))
    return torch.randn(out, num_inputs, generator=generator), inputs.t() @ inputs


def error(weight: torch.Tensor, found: Quantised, hessian: torch.Tensor) -> torch.Tensor:
    """(out,)"""
    away = (found.values() - weight).double()
    return ((away @ hessian.double()) * away).sum(1)


def test_the_sweep_is_the_one_of_the_formulas():
    """Column by column in plain loops, in order of the diagonal, with the whole inverse's Cholesky factor."""
    weight, hessian = layer(3, 70, seed=4)
    grid = Grid(3, False, 10)
    found = quantise.solve(weight, hessian, grid, FLOAT32, effort=SWEEP_ALONE)
    scale, zero = find_scales(weight, damped(hessian, 0.01).diagonal(), grid, FLOAT32).of_columns(70)
    order = hessian.diagonal().argsort(descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(hessian, 0.01)[order][:, order].double()), upper=True)
    left, wanted = weight.double()[:, order], torch.empty(3, 70, dtype=torch.float64)
    for at in range(70):
        s, z = scale[:, order[at]], zero[:, order[at]]
        wanted[:, at] = (((left[:, at] / s + z).round().clamp(-4, 3)) - z) * s
        left = left - ((left[:, at] - wanted[:, at]) / upper[at, at])[:, None] * upper[at]
    torch.testing.assert_close(found.values()[:, order].double(), wanted, rtol=1e-5, atol=1e-5)
    factor, _ = inverse_factor(hessian[order][:, order], 0.01)
    torch.testing.assert_close(factor.double(), upper, rtol=1e-3, atol=1e-5)


def test_descent_ends_where_no_single_code_can_be_improved():
    weight, hessian = layer(4, 12, seed=1)
    grid = Grid(2, True, 12)
    found = quantise.solve(weight, hessian, grid, FLOAT32, effort=Effort(damping=1e-9, rounds=0, descents=50))
    least = error(weight, found, hessian)
    for row, column in itertools.product(range(4), range(12)):
        for code in range(-2, 2):
            codes = found.codes.clone()
            codes[row, column] = code
            assert error(weight, found._replace(codes=codes), hessian)[row] >= least[row] * (1 - 1e-5)


def test_codes_of_a_few_columns_are_often_the_best_there_are():
    """Against all 4^5 combinations at the same scales: never better than the best, and mostly the best itself."""
    weight, hessian = layer(20, 5, seed=2)
    grid = Grid(2, True, 5)
    found = quantise.solve(weight, hessian, grid, FLOAT32, effort=Effort(damping=1e-9, rounds=0, descents=10))
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=5)), dtype=torch.int8)
    reached = error(weight, found, hessian)
    hit = 0
    for row in range(20):
        alone = Quantised(every, found.scale[row].expand(len(every), 1), found.zero_point[row].expand(len(every), 1))
        best = error(weight[row].expand(len(every), 5), alone, hessian).min()
        assert reached[row] >= best * (1 - 1e-5)
        hit += int(reached[row] <= best * (1 + 1e-5))
    assert hit >= 10


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_stage_lowers_the_error_of_every_row(bits: int, symmetric: bool):
    weight, hessian = layer(24, 96, seed=5)
    grid, solid = Grid(bits, symmetric, 32), damped(hessian, 0.01)
    plain = quantise.round_to_nearest(weight, grid, FLOAT32)
    stages = [
        quantise.solve(weight, hessian, grid, FLOAT32, effort=Effort(rounds=r, descents=d))
        for r, d in ((0, 0), (0, 1), (0, 3), (1, 3), (3, 3))
    ]
    errors = [error(weight, each, solid) for each in (plain, *stages)]
    assert float(errors[1].sum()) < 0.7 * float(errors[0].sum())
    for before, after in itertools.pairwise(errors[1:]):
        assert bool((after <= before * (1 + 1e-4)).all())
    assert float(errors[-1].sum()) < 0.95 * float(errors[1].sum())


def test_best_scales_are_least_squares():
    """With the codes as they are, no other scales of a row have a smaller error."""
    weight, hessian = layer(5, 24, seed=6)
    grid = Grid(3, True, 8)
    found = quantise.solve(weight, hessian, grid, FLOAT32, effort=Effort(damping=1e-9, rounds=4, descents=20))
    root = torch.linalg.cholesky(hessian.double()).t()
    for row in range(5):
        columns = torch.zeros(24, 3, dtype=torch.float64)
        for group in range(3):
            columns[8 * group : 8 * group + 8, group] = found.codes[row, 8 * group : 8 * group + 8].double()
        best = torch.linalg.lstsq(root @ columns, (root @ weight[row].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(found.scale[row].double(), best, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("grid", [Grid(4, False, 16), Grid(3, True, 16), Grid(8, True, None, "float")], ids=str)
def test_masked_weights_are_exactly_zero_and_the_rest_makes_up_for_them(grid: Grid):
    weight, hessian = layer(16, 64, seed=7)
    keep = torch.rand(16, 64, generator=torch.Generator().manual_seed(8)) < 0.5
    keep[3] = False
    found = quantise.solve(weight, hessian, grid, FLOAT32, keep=keep)
    assert not found.values()[~keep].any()
    first = quantise.solve(weight, hessian, grid, FLOAT32)
    dropped = error(
        weight,
        Quantised(
            torch.where(
                keep, first.codes.float(), first.zero_point.float().repeat_interleave(64 // first.scale.shape[1], 1)
            ).to(grid.code_dtype),
            first.scale,
            first.zero_point,
        ),
        hessian,
    )
    assert float(error(weight, found, hessian).sum()) < 0.8 * float(dropped.sum())


def test_dead_inputs_zero_rows_and_one_row_do_no_harm():
    weight, hessian = layer(6, 32, seed=9)
    hessian[5], hessian[:, 5] = 0, 0
    weight[2] = 0
    found = quantise.solve(weight, hessian, Grid(4, False, 16), torch.bfloat16)
    assert found.values().isfinite().all() and not found.values()[2].any()
    assert torch.equal(found.scale, found.scale.bfloat16().float())
    alone = quantise.solve(weight[:1], hessian, Grid(4, False, 16), torch.bfloat16)
    assert torch.equal(alone.codes, found.codes[:1])
    nothing = quantise.solve(weight, torch.zeros(32, 32), Grid(8, True), FLOAT32)
    assert float((nothing.values() - weight).abs().max()) < 0.03


def test_what_is_not_finite_is_refused():
    weight, hessian = layer(2, 8)
    with pytest.raises(ValueError, match="Hessian holds NaN"):
        quantise.solve(weight, hessian * float("nan"), Grid(4), FLOAT32)
    with pytest.raises(ValueError, match="weight holds NaN"):
        quantise.solve(weight * float("inf"), hessian, Grid(4), FLOAT32)
