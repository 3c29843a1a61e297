"""Scores of single weights: the statistics that a criterion's row asks for are gathered, and its formula applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tinygn_dist.backends.pieces import Shard
from tinygn_dist.estimate.backprop import weight_gradients
from tinygn_dist.estimate.gradient_energy import coarse, output_energy
from tinygn_dist.estimate.input_moments import InputMoments, input_moments
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.estimate.saved_moments import in_parts
from tinygn_dist.maths.counter_rng import key_of, uniform
from tinygn_dist.maths.criteria import CRITERIA, STATISTICS, Criterion
from tinygn_dist.maths.sums import Moments
from tinygn_dist.models.anatomy import Matrix

Values = Callable[[Matrix], torch.Tensor]
"""a matrix's statistic: (in,), (out,), or shaped like this rank's shard"""


def scores(problem: Problem, matrices: Sequence[Matrix], criterion: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """fp32 scores by matrix name, shaped like this rank's shards. criterion: one of `CRITERIA` that has a formula.
    seed: of criterion random. Collectives."""
    row = CRITERIA[criterion]
    assert row.formula is not None, f"{criterion} has no formula"
    statistics = {name: GATHERED[name](problem, matrices, seed) for name in row.needs}
    score = _whole if row.whole else _pieces
    return {matrix.name: score(problem, matrix, row, statistics) for matrix in matrices}


def _pieces(problem: Problem, matrix: Matrix, row: Criterion, statistics: dict[str, Values]) -> torch.Tensor:
    shard = problem.backend.shard(problem.model, matrix)
    return row.formula(shard.weight, **{n: _laid_out(matrix, n, f(matrix), shard) for n, f in statistics.items()})


def _laid_out(matrix: Matrix, name: str, values: torch.Tensor, shard: Shard) -> torch.Tensor:
    match STATISTICS[name].per:
        case "input":
            return matrix.per_input(values, shard.weight, shard.offset)
        case "output":
            return matrix.per_output(values, shard.weight, shard.offset)
    return values


def _whole(problem: Problem, matrix: Matrix, row: Criterion, statistics: dict[str, Values]) -> torch.Tensor:
    """Sums of rows and of columns need the whole matrix: one at a time."""
    backend = problem.backend
    gathered = backend.gather(problem.model, matrix, backend.shard(problem.model, matrix).weight)
    found = row.formula(matrix.oriented(gathered), **{name: values(matrix) for name, values in statistics.items()})
    return backend.shard_of(problem.model, matrix, matrix.oriented(found).contiguous())


def _uniform(problem: Problem, matrices: Sequence[Matrix], seed: int) -> Values:
    def draw(matrix: Matrix) -> torch.Tensor:
        shard = problem.backend.shard(problem.model, matrix)
        end = shard.offset + shard.weight.numel()
        drawn = uniform(shard.offset, end, key_of(seed, matrix.name))
        return drawn.view(shard.weight.shape).to(shard.weight.device)

    return draw


def _input_sq_sum(problem: Problem, matrices: Sequence[Matrix], seed: int) -> Values:
    """(in,) fp32 sums of squares of what a matrix reads, over the data of all ranks."""
    found = in_parts(problem, "inputs", lambda some: input_moments(some, matrices, full=False), InputMoments())
    problem.backend.sum_over_data(found.moments.tensors())
    return lambda matrix: found.moments.rounded(found.of(matrix))


def _grad_sum(problem: Problem, matrices: Sequence[Matrix], seed: int) -> Values:
    sums = in_parts(problem, "gradients", lambda some: weight_gradients(some, matrices, squares=False), Moments())
    return lambda matrix: sums.rounded(matrix.name)


def _grad_sq_sum(problem: Problem, matrices: Sequence[Matrix], seed: int) -> Values:
    sums = in_parts(problem, "gradients", lambda some: weight_gradients(some, matrices, squares=True), Moments())
    return lambda matrix: sums.rounded(matrix.name)


def _output_grad_sq_sum(problem: Problem, matrices: Sequence[Matrix], seed: int) -> Values:
    """(out,) fp32, rounded so that it is the same on every backend (see `coarse`)."""
    sums = output_energy(problem, matrices)
    problem.backend.sum_over_data(sums.tensors())
    return lambda matrix: coarse(sums.rounded(matrix.name))


GATHERED: dict[str, Callable[[Problem, Sequence[Matrix], int], Values]] = {
    "uniform": _uniform,
    "input_sq_sum": _input_sq_sum,
    "grad_sum": _grad_sum,
    "grad_sq_sum": _grad_sq_sum,
    "output_grad_sq_sum": _output_grad_sq_sum,
}
"""(problem, matrices, seed) -> values; one for each of `maths.criteria.STATISTICS`"""
