"""Weight patterns (unstructured, N:M): estimate what the criterion needs, score, select, and for `obs` solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.estimator import resolve_estimator
from tinygn_dist.estimate.hessians import gram_gib, layer_groups
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths import criteria
from tinygn_dist.maths.criteria import CRITERIA, SOLVER
from tinygn_dist.models.anatomy import Anatomy, Matrix
from tinygn_dist.prune.sparsity.allocations import experimental_allocation, solve_in_passes
from tinygn_dist.prune.sparsity.levels import Level, final_level, levels_of_passes
from tinygn_dist.prune.sparsity.mask_selection import check_nm, choose_masks
from tinygn_dist.prune.sparsity.masks import Masks
from tinygn_dist.prune.sparsity.solve import task_of, warn_unreached
from tinygn_dist.prune.sparsity.weight_scores import scores


@dataclass(frozen=True)
class MaskGoal:
    """What one choice of masks has to reach. criterion: a row of `CRITERIA`. level: how sparse. passes: of the solver;
    None: as many as it takes."""

    criterion: str
    level: Level
    passes: int | None = None


def goal_of(options: PruneConfig) -> MaskGoal:
    """All at once."""
    return MaskGoal(criterion_of(options.criterion), final_level(options), options.solver.passes)


def criterion_of(name: str) -> str:
    return SOLVER if name == "auto" else name


def check(anatomy: Anatomy, matrices: Sequence[Matrix], options: PruneConfig) -> None:
    """UserError, before anything is computed, for what cannot be done with these weights."""
    if options.nm:
        check_nm(matrices, options.nm.m)
    if criterion_of(options.criterion) != SOLVER:
        return
    solver, row = options.solver, experimental_allocation(options.solver.allocation)
    if len(layer_groups(anatomy, matrices, solver.gram_gib)) > 1 and row and row.all_layers:
        raise UserError(
            f"allocation {solver.allocation} solves all layers from one measurement, whose Gram matrices take "
            f"{gram_gib(matrices):.3g} GiB; raise prune.solver.gram_gib ({solver.gram_gib:g}), or use allocation auto"
        )


def sparsify(problem: Problem, matrices: Sequence[Matrix], options: PruneConfig, goal: MaskGoal | None = None) -> Masks:
    """Choose masks and apply them to the live weights (criterion obs also updates what is kept). goal: by default all
    that the options ask for."""
    goal = goal or goal_of(options)
    by = _by_solver if goal.criterion == SOLVER else _by_scores
    chosen = by(problem, matrices, options, goal)
    chosen.apply_(problem.model, problem.backend)
    return chosen


def _by_solver(problem: Problem, matrices: Sequence[Matrix], options: PruneConfig, goal: MaskGoal) -> Masks:
    beside = round(min(gram_gib(matrices), options.solver.gram_gib) * 2**30)
    estimator, note = resolve_estimator(problem, options.estimator, beside)
    levels = levels_of_passes(goal.level, goal.passes)
    masks = solve_in_passes(problem, matrices, task_of(options, goal.level, estimator == "backprop"), levels)
    return Masks(matrices, masks.by_name, (*([note] if note else []), *masks.notes))


def _by_scores(problem: Problem, matrices: Sequence[Matrix], options: PruneConfig, goal: MaskGoal) -> Masks:
    """Masks by scores; experts without any are pruned by magnitude, each to the same sparsity on its own: where the
    whole model competes, scores of another scale would empty them or spare them."""
    row, level = CRITERIA[goal.criterion], goal.level
    scored = scores(problem, matrices, goal.criterion, options.seed)
    scope = row.scope if options.scope == "auto" else options.scope
    alone = {t.name: t for t in _unreached(problem, matrices, scored)} if row.needs_data else {}
    warn_unreached(alone.values())
    for name, matrix in alone.items():
        scored[name] = criteria.magnitude(problem.backend.shard(problem.model, matrix).weight)
    masks: dict[str, torch.Tensor] = {}
    allocation = experimental_allocation(options.solver.allocation)
    if allocation and allocation.budgets:
        pruned = allocation.budgets(problem, matrices, level, options.experiments)
        for matrix in matrices:
            own = Level(pruned[matrix.name] / matrix.numel)
            masks |= choose_masks(problem, [matrix], scored, own, scope)
        return Masks(matrices, masks)
    apart = [matrix for matrix in matrices if scope == "global" and matrix.name in alone]
    together = [matrix for matrix in matrices if matrix not in apart]
    for among, within in ((together, scope), (apart, "layer")):
        masks |= choose_masks(problem, among, scored, level, within) if among else {}
    return Masks(matrices, masks)


def _unreached(problem: Problem, matrices: Sequence[Matrix], scored: Mapping[str, torch.Tensor]) -> list[Matrix]:
    """Experts that no calibration token reached, whose scores are all zero: those say nothing about them."""
    experts = [matrix for matrix in matrices if matrix.index is not None]
    nonzero = torch.tensor([int(torch.count_nonzero(scored[t.name])) for t in experts], dtype=torch.int64)
    nonzero = problem.backend.sum_over_shards(nonzero).tolist() if experts else []
    return [matrix for matrix, count in zip(experts, nonzero, strict=True) if count == 0]
