"""How many weights each layer loses: budgets between equal shares and one global cut of the saliency in units of loss, or
by the layers' outliers.

The saliency is right to second order at the model it was measured on, which the compressed one is not, so the best budgets
lie on the way. How far depends on the model; `best_of` tries, equal shares included, and compares held-out losses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from tinygn_dist.backends.pieces import Job
from tinygn_dist.config import DEFAULT_SHARE, PruneConfig
from tinygn_dist.estimate.gradient_energy import coarse
from tinygn_dist.estimate.hessians import LayerStatistics, has_budgets
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.evaluate.quality import mean_loss
from tinygn_dist.maths.counts import blend, num_kept
from tinygn_dist.maths.solve import obs
from tinygn_dist.models.anatomy import Matrix

log = logging.getLogger(__name__)
CANDIDATES = (0.0, 0.5, 0.75, 1.0)
Masks = dict[str, torch.Tensor]


def shares(options: PruneConfig) -> Sequence[float]:
    """How far to go towards the global cut of the saliency; several to try."""
    if not has_budgets(options):
        return (0.0,)
    if options.scope == "global":
        return (1.0,)
    if options.allocation == "search":
        return (DEFAULT_SHARE,)
    return CANDIDATES if options.allocation == "auto" else (options.allocation,)


class _Tried(NamedTuple):
    loss: float
    share: float
    masks: Masks
    weights: dict[str, torch.Tensor]


def best_of(
    candidates: Sequence[float], held_out: Problem, matrices: Sequence[Matrix], solve: Callable[[float], Masks]
) -> Masks:
    """Solve at every candidate share, each from the weights that are there now, and leave the model and return the masks of
    the one with the least loss on `held_out`. Holds two copies of this rank's pieces of the weights."""
    backend, model = held_out.backend, held_out.model

    def copies() -> dict[str, torch.Tensor]:
        return {matrix.name: backend.shard(model, matrix).weight.clone() for matrix in matrices}

    def put_back(weights: dict[str, torch.Tensor]) -> None:
        for matrix in matrices:
            backend.write(model, matrix, weights[matrix.name])

    before, best, told = copies(), None, []
    for share in candidates:
        masks = solve(share)
        loss = mean_loss(held_out, f"allocation {share:g}")
        told.append(f"{share:g}: {loss:.4f}")
        if best is None or loss < best.loss:
            best = _Tried(loss, share, masks, copies())
        put_back(before)
    put_back(best.weights)
    note = f"allocation {best.share:g} chosen by held-out loss ({', '.join(told)})"
    log.info(note)
    held_out.notes.append(note)
    return best.masks


def allocate(
    problem: Problem, matrices: Sequence[Matrix], measured: LayerStatistics, options: PruneConfig, share: float
) -> dict[str, int]:
    """How many entries of each matrix go: `share` of the way from the same share everywhere to one global cut of
    the saliency in units of loss. Experts whose tokens had no gradient have no saliency and are not in it.

    Saliencies are counted by size and not kept: there are as many as weights.
    """
    row_of = {matrix.name: row for row, matrix in enumerate(matrices)}
    tallies = torch.zeros(len(matrices), _BINS, dtype=torch.int64)

    def look(job: Job, weights: list[torch.Tensor]) -> None:
        for index, (matrix, weight) in enumerate(zip(job.matrices, weights, strict=True)):
            cost = loss_per_error(job, index)
            if cost is not None:
                saliency = obs.saliency(weight, job.moments[0].float(), options.damping)
                tallies[row_of[matrix.name]] = tally(saliency.mul_(cost[:, None]))

    for jobs in measured.jobs(solving=False):
        problem.backend.look_at_targets(problem.model, jobs, look)
    problem.backend.sum_over_data([tallies])  # each rank looked at the matrices it owns
    competing = [matrix for matrix, counted in zip(matrices, tallies.any(1).tolist(), strict=True) if counted]
    sizes = [matrix.numel for matrix in competing]
    going = sum(sizes) - num_kept(sum(sizes), options.sparsity)
    if going == 0:
        return {}
    pruned = blend(going, sizes, below_cut(tallies[tallies.any(1)], going).tolist(), share)
    return {matrix.name: count for matrix, count in zip(competing, pruned, strict=True)}


def by_outliers(
    problem: Problem, matrices: Sequence[Matrix], scores: Mapping[str, torch.Tensor], options: PruneConfig
) -> dict[str, int]:
    """How many entries of each matrix go by OWL (Yin et al. 2024). An outlier is a score of Wanda, |w| ||x||, above
    `owl_outliers` times its layer's mean; from the layer with the smallest share of them to the one with the largest, density
    rises evenly by twice `owl_spread`, around the mean that is asked for. Matrices of one layer are alike.

    scores: of Wanda, shaped like this rank's shards. Where twice the spread is more than what goes or stays in all, it is that.
    """
    sum_over_shards = problem.backend.sum_over_shards
    layers = sorted({matrix.layer for matrix in matrices})
    row_of = {matrix.name: layers.index(matrix.layer) for matrix in matrices}
    sums, above = (torch.zeros(len(layers), dtype=kind) for kind in (torch.float64, torch.int64))
    sizes = torch.zeros(len(layers), dtype=torch.float64)
    for matrix in matrices:
        sums[row_of[matrix.name]] += float(scores[matrix.name].double().sum())
        sizes[row_of[matrix.name]] += matrix.numel
    limits = options.owl_outliers * sum_over_shards(sums) / sizes
    for matrix in matrices:
        row = row_of[matrix.name]
        above[row] += int((scores[matrix.name].double() > limits[row]).sum())
    density = outlier_densities(sum_over_shards(above) / sizes, sizes, 1 - options.sparsity, options.owl_spread)
    numbers = [matrix.numel for matrix in matrices]
    wanted = [t.numel * (1 - float(density[row_of[t.name]])) for t in matrices]
    counts = blend(sum(numbers) - num_kept(sum(numbers), options.sparsity), numbers, wanted, 1.0)
    return {matrix.name: count for matrix, count in zip(matrices, counts, strict=True)}


def outlier_densities(outliers: torch.Tensor, sizes: torch.Tensor, density: float, spread: float) -> torch.Tensor:
    """(layers,) fp64 densities whose mean, weighted by the layers' sizes, is `density`. outliers: (layers,) shares."""
    reach = outliers.max() - outliers.min()
    if reach == 0:
        return torch.full_like(outliers, density)
    steps = (outliers - outliers.min()) / reach * min(2 * spread, density, 1 - density)
    return density + steps - (steps * sizes).sum() / sizes.sum()


_SHIFT, _BINS = 19, 1 << 12
"""bits of an fp32 that are dropped: sixteen bins from one power of two to the next"""


def tally(saliency: torch.Tensor) -> torch.Tensor:
    """(_BINS,) int64 numbers of entries by size, on the CPU. saliency: fp32, none negative."""
    bits = saliency.contiguous().view(torch.int32).flatten() >> _SHIFT
    return torch.bincount(bits, minlength=_BINS).cpu()


def below_cut(tallies: torch.Tensor, going: int) -> torch.Tensor:
    """(matrices,) fp64 numbers of entries below the cut that `going` of all of them lie below. tallies: (matrices, _BINS)
    int64. Of the bin that the cut lies in every matrix gives the same share."""
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
