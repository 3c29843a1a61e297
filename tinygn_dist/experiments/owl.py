"""Budgets by outliers (OWL, Yin et al. 2024): `--prune.solver.allocation owl`, with any criterion.

An outlier is a score of Wanda, |w| ||x||, above `outliers` times its layer's mean; from the layer with the smallest
share of them to the one with the largest, density rises evenly by twice `spread`, around the mean that is asked for.
Matrices of one layer are alike. Where twice the spread is more than what goes or stays in all, it is that.

Figure: 48.86 against 41.60 of shares by saliency at 50 % (docs/results.md). A perplexity below theirs, on any model,
would bring it in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import Field

from tinygn_dist.config import PruneConfig, Section
from tinygn_dist.config.experiments import Options, options_of
from tinygn_dist.estimate.hessians import hessians
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.counts import blend, num_kept
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.prune.sparsity.allocations import Allocation
from tinygn_dist.prune.sparsity.levels import Level
from tinygn_dist.prune.sparsity.masks import Masks
from tinygn_dist.prune.sparsity.solve import SolverTask, hessian_options, solve
from tinygn_dist.prune.sparsity.weight_scores import scores


class OwlOptions(Section):
    outliers: float = Field(5.0, gt=1)
    """a weight is an outlier where |w| ||x|| is more than so many times its layer's mean"""
    spread: float = Field(0.08, gt=0, lt=0.5)
    """how far from the mean a layer's density may be; twice that lie between the layers with the fewest and the most
    outliers"""


def check(options: PruneConfig) -> None:
    """ValueError where layers may not differ."""
    if options.pattern != "unstructured" or options.scope == "global":
        raise ValueError(
            f"solver.allocation owl gives every layer a number of zeros, got pattern {options.pattern} and scope "
            f"{options.scope}, accepted: pattern unstructured, scope auto, layer or row"
        )


def in_passes(problem: Problem, matrices: Sequence[Matrix], task: SolverTask, levels: Sequence[Level]) -> Masks:
    """Budgets are taken anew before each pass."""
    notes: tuple[str, ...] = ()
    for level in levels:
        here = replace(task, level=level)
        measured = hessians(problem, matrices, hessian_options(here, False))
        pruned = budgets(problem, matrices, level, task.experiments)
        masks = solve(problem, matrices, measured, pruned, here)
        notes += masks.notes
    return Masks(matrices, masks.by_name, notes)


def budgets(problem: Problem, matrices: Sequence[Matrix], level: Level, experiments: Options) -> dict[str, int]:
    """How many entries of each matrix go."""
    asked = options_of(experiments, "owl", OwlOptions)
    layers = sorted({matrix.layer for matrix in matrices})
    sizes = torch.zeros(len(layers), dtype=torch.float64)
    for matrix in matrices:
        sizes[layers.index(matrix.layer)] += matrix.numel
    outliers = outlier_shares(problem, matrices, scores(problem, matrices, "wanda"), asked.outliers)
    density = outlier_densities(outliers, sizes, 1 - level.sparsity, asked.spread)
    numbers = [matrix.numel for matrix in matrices]
    wanted = [t.numel * (1 - float(density[layers.index(t.layer)])) for t in matrices]
    counts = blend(sum(numbers) - num_kept(sum(numbers), level.sparsity), numbers, wanted, 1.0)
    return {matrix.name: count for matrix, count in zip(matrices, counts, strict=True)}


def outlier_shares(
    problem: Problem, matrices: Sequence[Matrix], wanda: Mapping[str, torch.Tensor], times: float
) -> torch.Tensor:
    """(layers,) fp64. wanda: scores shaped like this rank's shards. times: the layer's mean. A collective."""
    sum_over_shards = problem.backend.sum_over_shards
    layers = sorted({matrix.layer for matrix in matrices})
    row_of = {matrix.name: layers.index(matrix.layer) for matrix in matrices}
    sums, above = (torch.zeros(len(layers), dtype=kind) for kind in (torch.float64, torch.int64))
    sizes = torch.zeros(len(layers), dtype=torch.float64)
    for matrix in matrices:
        sums[row_of[matrix.name]] += float(wanda[matrix.name].double().sum())
        sizes[row_of[matrix.name]] += matrix.numel
    limits = times * sum_over_shards(sums) / sizes
    for matrix in matrices:
        row = row_of[matrix.name]
        above[row] += int((wanda[matrix.name].double() > limits[row]).sum())
    return sum_over_shards(above) / sizes


def outlier_densities(outliers: torch.Tensor, sizes: torch.Tensor, density: float, spread: float) -> torch.Tensor:
    """(layers,) fp64 densities whose mean, weighted by the layers' sizes, is `density`. outliers: (layers,) shares."""
    reach = outliers.max() - outliers.min()
    if reach == 0:
        return torch.full_like(outliers, density)
    steps = (outliers - outliers.min()) / reach * min(2 * spread, density, 1 - density)
    return density + steps - (steps * sizes).sum() / sizes.sum()


OPTIONS = {"owl": OwlOptions}
ALLOCATIONS = {"owl": Allocation(in_passes, check, budgets)}
