"""The quantiser on live weights: what is on the grid stays as it is, what is not is found and put back."""

import pytest
import torch

from tests import tiny
from tinygn_dist.backends.base import Backend
from tinygn_dist.maths.grids import Grid
from tinygn_dist.maths.solve.quantise import round_to_nearest
from tinygn_dist.quantize.quantiser import Quantiser

GRIDS = [Grid(2, True, 16), Grid(4, False, 16), Grid(8), Grid(8, True, None, "float")]


def rounded(family: str, grid: Grid, dtype: torch.dtype, backend: Backend):
    """A problem whose weights lie on the grid, and their quantiser."""
    problem = tiny.problem(family, backend, tiny.build(family).to(dtype))
    matrices, scales = problem.anatomy.matrices, {}
    for matrix in matrices:
        weight = problem.bare.get_parameter(matrix.parameter)
        found = round_to_nearest(matrix.oriented(weight.data), grid, dtype)
        scales[matrix.name] = found.scales()
        matrix.oriented(weight.data).copy_(found.values())
    return problem, Quantiser(matrices, {matrix.name: grid for matrix in matrices}, scales)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_weight_on_its_grid_stays_and_one_off_it_comes_back(
    grid: Grid, dtype: torch.dtype, family: str, backend: Backend
):
    problem, quantiser = rounded(family, grid, dtype, backend)
    model, before = problem.model, tiny.state_bytes(problem.model)
    assert quantiser.violations(model, backend) == 0
    fingerprint = quantiser.fingerprint(model, backend)
    quantiser.apply_(model, backend)
    assert tiny.same_bits(before, tiny.state_bytes(model)) and quantiser.fingerprint(model, backend) == fingerprint
    weight = problem.bare.get_parameter(quantiser.matrices[2].parameter).data
    weight.view(-1)[:7] += 0.01 * weight.abs().max()
    off = quantiser.violations(model, backend)
    assert 0 < off <= 7
    quantiser.apply_(model, backend)
    assert quantiser.violations(model, backend) == 0


def test_the_fingerprint_tells_codes_and_scales(backend: Backend):
    problem, quantiser = rounded("llama", Grid(4, True, 16), torch.float32, backend)
    first = quantiser.fingerprint(problem.model, backend)
    name = quantiser.matrices[0].name
    scale = quantiser.scales[name]
    weight = problem.bare.get_parameter(name).data
    changed = weight.clone()
    weight[0, 0] += float(scale.scale[0, 0]) * (1 if weight[0, 0] <= 0 else -1)
    assert quantiser.violations(problem.model, backend) == 0
    assert quantiser.fingerprint(problem.model, backend) != first
    weight.copy_(changed)
    assert quantiser.fingerprint(problem.model, backend) == first
    weight[0, :16] *= 2
    quantiser.scales[name] = scale._replace(scale=scale.scale.clone())
    quantiser.scales[name].scale[0, 0] *= 2
    assert quantiser.violations(problem.model, backend) == 0
    assert quantiser.fingerprint(problem.model, backend) != first
