"""From a model to codes: measure Hessians, solve each matrix by whole rows where its statistics lie, write the
weights."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from tinygn_dist.backends.pieces import Edited, Extras, Job
from tinygn_dist.estimate.hessians import HessianOptions, hessians
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.grids import Grid, Quantised, Scales
from tinygn_dist.maths.solve import quantise
from tinygn_dist.maths.solve.quantise import Effort
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.quantize.quantiser import Quantiser

PLAIN = 1.0
"""weight of every token in the Hessian beside its gradient energy (mean 1): rows do not compete. Figures in
docs/results.md"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CodeTask:
    """What is asked of every matrix. masked: names of those whose zeros have to stay. effort: None rounds to nearest,
    without data. backprop: Hessians are weighted by gradient energy. gram_gib: room for Hessians on each rank."""

    grids: Mapping[str, Grid]
    masked: Collection[str] = ()
    effort: Effort | None = Effort()
    backprop: bool = True
    gram_gib: float = 16


def quantize(problem: Problem, matrices: Sequence[Matrix], task: CodeTask) -> Quantiser:
    """The matrices of the live model on their grids. A collective."""

    def solve_job(job: Job, weights: list[torch.Tensor]) -> list[Edited]:
        return [_edited(task, job, matrix, weight) for matrix, weight in zip(job.matrices, weights, strict=True)]

    scales: dict[str, Scales] = {}
    for jobs in _jobs(problem, matrices, task):
        extras = problem.backend.map_matrices(problem.model, jobs, solve_job)
        scales |= {name: _scales(each) for name, each in extras.items()}
    return Quantiser(matrices, task.grids, scales)


def _jobs(problem: Problem, matrices: Sequence[Matrix], task: CodeTask) -> Iterator[list[Job]]:
    if task.effort is None:
        yield [Job((matrix,), [], float(matrix.numel)) for matrix in matrices]
        return
    measured = hessians(problem, matrices, HessianOptions(task.gram_gib, task.backprop, PLAIN, name="quantize"))
    yield from measured.jobs(solving=True)


def _edited(task: CodeTask, job: Job, matrix: Matrix, weight: torch.Tensor) -> Edited:
    found = _solved(task, job, matrix, weight)
    return Edited(found.values(), {"scale": found.scale, "zero_point": found.zero_point})


def _solved(task: CodeTask, job: Job, matrix: Matrix, weight: torch.Tensor) -> Quantised:
    """Scales are stored in the weight's dtype. Zeros of a masked matrix are its masked weights."""
    grid = task.grids[matrix.name]
    if task.effort is None:
        return quantise.round_to_nearest(weight, grid, weight.dtype)
    hessian = job.moments[0].float()
    if matrix.index is not None and not hessian.any():
        log.warning("no calibration token reached %s: its weights are rounded to nearest", matrix.name)
        hessian = torch.eye(len(hessian), device=hessian.device)
    keep = weight != 0 if matrix.name in task.masked else None
    return quantise.solve(weight, hessian, grid, weight.dtype, keep=keep, effort=task.effort)


def _scales(extras: Extras) -> Scales:
    return Scales(extras["scale"], extras["zero_point"].float())
