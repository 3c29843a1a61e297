"""A whole model on its grids: every family, with and without data, masks, all matrices at once or layer by layer."""

import pytest
import torch

from tests import tiny
from tests.contract import sharded_models
from tinygn_dist.backends.base import Backend
from tinygn_dist.estimate.hessians import HessianOptions, hessians
from tinygn_dist.maths.grids import Grid
from tinygn_dist.maths.solve import quantise
from tinygn_dist.maths.solve.quantise import Effort
from tinygn_dist.quantize.quantize import PLAIN, CodeTask, quantize


def task_for(problem, grid: Grid, **more) -> CodeTask:
    return CodeTask({matrix.name: grid for matrix in problem.anatomy.matrices}, **more)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("grid", [Grid(3, False, 16), Grid(8, True, None, "float")], ids=str)
def test_every_weight_lies_on_its_grid_and_the_rest_is_as_it_was(family: str, grid: Grid, backend: Backend):
    problem = tiny.problem(family, backend)
    before = tiny.state_bytes(problem.model)
    matrices = problem.anatomy.matrices
    quantiser = quantize(problem, matrices, task_for(problem, grid))
    assert quantiser.violations(problem.model, backend) == 0
    names = {matrix.parameter for matrix in matrices}
    after = tiny.state_bytes(problem.model)
    others = [{name: t for name, t in state.items() if name not in names} for state in (before, after)]
    assert tiny.same_bits(*others) and not any(torch.equal(before[name], after[name]) for name in names)
    for matrix in matrices:
        weight, groups = matrix.oriented(after[matrix.parameter]), quantiser.scales[matrix.name].scale.shape[1]
        for group in weight.view(weight.shape[0], groups, -1).flatten(0, 1):
            assert len(group.unique()) <= 2**grid.bits


def test_codes_are_those_of_the_layer_solver_with_the_hessians_measured(backend: Backend):
    problem, grid = tiny.problem("llama", backend), Grid(3, False, 16)
    matrices, effort = problem.anatomy.matrices, Effort(damping=0.03, rounds=1)
    wanted = {}
    for jobs in hessians(problem, matrices, HessianOptions(plain=PLAIN, name="test")).jobs(solving=False):
        for job in jobs:
            for matrix in job.matrices:
                weight = problem.bare.get_parameter(matrix.parameter).data
                wanted[matrix.name] = quantise.solve(weight, job.moments[0].float(), grid, weight.dtype, effort=effort)
    quantiser = quantize(problem, matrices, task_for(problem, grid, effort=effort))
    for name, found in wanted.items():
        assert torch.equal(problem.bare.get_parameter(name).data, found.values())
        assert torch.equal(quantiser.scales[name].scale, found.scale)


def test_with_data_the_outputs_move_less_than_without(backend: Backend):
    moved = {}
    for name, more in {"sweep": {}, "inputs alone": {"backprop": False}, "nearest": {"effort": None}}.items():
        problem = tiny.problem("llama", backend, count=8, length=24, padded=False)
        ids = torch.cat([batch["input_ids"] for batch in problem.batches])
        with torch.no_grad():
            dense = problem.model(ids).logits.log_softmax(-1)
        quantize(problem, problem.anatomy.matrices, task_for(problem, Grid(3, False, 16), **more))
        with torch.no_grad():
            after = problem.model(ids).logits.log_softmax(-1)
        moved[name] = float((dense.exp() * (dense - after)).sum(-1).mean())
    assert max(moved["sweep"], moved["inputs alone"]) < 0.6 * moved["nearest"]


@pytest.mark.parametrize("gram_gib", [16, 0])
def test_masked_weights_stay_zero(gram_gib: float, backend: Backend):
    problem = tiny.problem("llama", backend)
    matrices = problem.anatomy.matrices
    zeros = {}
    for matrix in matrices[::2]:
        weight = problem.bare.get_parameter(matrix.parameter).data
        weight[:, 1::2] = 0
        zeros[matrix.name] = weight == 0
    quantiser = quantize(problem, matrices, task_for(problem, Grid(4, False, 16), masked=set(zeros), gram_gib=gram_gib))
    assert quantiser.violations(problem.model, backend) == 0
    for name, zero in zeros.items():
        assert not problem.bare.get_parameter(name).data[zero].any()


def test_experts_without_a_token_are_rounded(backend: Backend):
    problem = sharded_models.problem(backend, sharded_models.mixtral())
    matrices = [matrix for matrix in problem.anatomy.matrices if matrix.index is not None]
    quantiser = quantize(problem, matrices, task_for(problem, Grid(4, True, 8)))
    assert quantiser.violations(problem.model, backend) == 0
