"""How many weights each matrix loses: budgets between equal shares and one global threshold on the saliency in units of
loss.

The saliency is right to second order at the model it was measured on, which the compressed one is not, so the best
budgets lie on the way. How far depends on the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tinygn_dist.backends.pieces import Job
from tinygn_dist.estimate.gradient_energy import coarse
from tinygn_dist.estimate.hessians import Hessians
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.counts import blend, num_kept
from tinygn_dist.maths.solve import obs
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.prune.sparsity.levels import Level


def equal_budgets(matrices: Sequence[Matrix], level: Level, scope: str) -> dict[str, int]:
    """The same share of every matrix, or of every row of it."""
    groups = {t.name: (t.shape if scope == "row" else (1, t.numel)) for t in matrices}
    return {name: rows * (size - num_kept(size, level.sparsity)) for name, (rows, size) in groups.items()}


def saliency_tallies(
    problem: Problem, matrices: Sequence[Matrix], measured: Hessians, damping: float
) -> dict[str, torch.Tensor]:
    """(_BINS,) int64 numbers of each matrix's entries by the loss that removing them costs. Experts whose tokens had no
    gradient have no saliency and are not in it. They are counted by size and not kept: there are as many as weights."""
    row_of = {matrix.name: row for row, matrix in enumerate(matrices)}
    tallies = torch.zeros(len(matrices), _BINS, dtype=torch.int64)

    def look(job: Job, weights: list[torch.Tensor]) -> None:
        for index, (matrix, weight) in enumerate(zip(job.matrices, weights, strict=True)):
            cost = loss_per_error(job, index)
            if cost is not None:
                saliency = obs.saliency(weight, job.moments[0].float(), damping)
                tallies[row_of[matrix.name]] = tally(saliency.mul_(cost[:, None]))

    for jobs in measured.jobs(solving=False):
        problem.backend.look_at_targets(problem.model, jobs, look)
    problem.backend.sum_over_data([tallies])  # each rank looked at the matrices it owns
    counted = tallies.any(1).tolist()
    return {matrix.name: tallies[row] for row, matrix in enumerate(matrices) if counted[row]}


def budgets_at(
    share: float, tallies: dict[str, torch.Tensor], matrices: Sequence[Matrix], level: Level
) -> dict[str, int]:
    """How many entries go of each matrix that has a tally: `share` of the way from equal shares to one threshold for
    all."""
    competing = [matrix for matrix in matrices if matrix.name in tallies]
    sizes = [matrix.numel for matrix in competing]
    going = sum(sizes) - num_kept(sum(sizes), level.sparsity)
    if going == 0:
        return {}
    below = below_threshold(torch.stack([tallies[matrix.name] for matrix in competing]), going)
    pruned = blend(going, sizes, below.tolist(), share)
    return {matrix.name: count for matrix, count in zip(competing, pruned, strict=True)}


_SHIFT, _BINS = 19, 1 << 12
"""bits of an fp32 that are dropped: sixteen bins from one power of two to the next"""


def tally(saliency: torch.Tensor) -> torch.Tensor:
    """(_BINS,) int64 numbers of entries by size, on the CPU. saliency: fp32, none negative."""
    bits = saliency.contiguous().view(torch.int32).flatten() >> _SHIFT
    return torch.bincount(bits, minlength=_BINS).cpu()


def below_threshold(tallies: torch.Tensor, going: int) -> torch.Tensor:
    """(matrices,) fp64 numbers of entries below the threshold that `going` of all of them lie below. tallies:
    (matrices, _BINS) int64. Of the bin that the threshold lies in every matrix gives the same share."""
    under = tallies.sum(0).cumsum(0)
    at = int(torch.searchsorted(under, going))
    below, inside = tallies[:, :at].sum(1).double(), tallies[:, at].double()
    return below + inside * (going - below.sum()) / inside.sum()


def loss_per_error(job: Job, index: int) -> torch.Tensor | None:
    """(out,) what a unit of squared error at each output row of a matrix costs in loss, up to one factor for the whole
    model: the row's gradient energy over the trace of the Hessian that the error is measured with. None where no
    gradient was measured."""
    rows = job.moments[1 + index].float() if len(job.moments) > 1 else torch.zeros(())
    trace = job.moments[0].diagonal().float().sum()
    return coarse(rows / trace) if rows.any() and trace > 0 else None
