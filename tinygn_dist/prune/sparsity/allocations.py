"""How the solver's zeros are shared out between matrices: a share of the way to a global threshold, or the best of
several.

Each allocation measures, makes budgets and solves in a row, once for each pass. Others are leaf files of experiments/.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from tinygn_dist.config import PruneConfig
from tinygn_dist.config.experiments import Options
from tinygn_dist.estimate.hessians import hessians
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.evaluate.quality import mean_loss
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.prune.sparsity.budgets import budgets_at, equal_budgets, saliency_tallies
from tinygn_dist.prune.sparsity.levels import Level
from tinygn_dist.prune.sparsity.masks import Masks
from tinygn_dist.prune.sparsity.solve import SolverTask, hessian_options, solve
from tinygn_dist.registry import experimental

log = logging.getLogger(__name__)
CANDIDATES = (0.0, 0.5, 0.75, 1.0)
InPasses = Callable[[Problem, Sequence[Matrix], SolverTask, Sequence[Level]], Masks]
Budgets = Callable[[Problem, Sequence[Matrix], Level, Options], dict[str, int]]


@dataclass(frozen=True)
class Allocation:
    """A row of ALLOCATIONS.

    in_passes: (problem, matrices, task, level after each pass) -> masks, with the new weights in the model. check:
    raises ValueError for options that do not fit. budgets: (problem, matrices, level, options of experiments) -> how
    many entries of each matrix go, for criteria that only score; None where the solver is needed. all_layers:
    whether all layers have to be measured at once. micro_batches: of calibration data, at least.
    """

    in_passes: InPasses
    check: Callable[[PruneConfig], None]
    budgets: Budgets | None = None
    all_layers: bool = False
    micro_batches: int = 1


def experimental_allocation(allocation: float | str) -> Allocation | None:
    """None for those that are built in."""
    built_in = allocation == "auto" or not isinstance(allocation, str)
    return None if built_in else experimental("ALLOCATIONS", Allocation)[allocation]


def solve_in_passes(problem: Problem, matrices: Sequence[Matrix], task: SolverTask, levels: Sequence[Level]) -> Masks:
    """Masks after the last pass, as `task.solver.allocation` asks."""
    if row := experimental_allocation(task.solver.allocation):
        return row.in_passes(problem, matrices, task, levels)
    return by_shares(problem, matrices, task, levels, shares(task))


def by_shares(
    problem: Problem,
    matrices: Sequence[Matrix],
    task: SolverTask,
    levels: Sequence[Level],
    candidates: Sequence[float],
) -> Masks:
    """In every pass the best of the candidates. levels: one at least."""
    notes: tuple[str, ...] = ()
    for level in levels:
        here = replace(task, level=level)
        if len(candidates) > 1:
            masks = _best_of(candidates, *problem.split(task.held_out_sequences), matrices, here)
        else:
            measured = hessians(problem, matrices, hessian_options(here, competes(here)))
            tallies = saliency_tallies(problem, matrices, measured, task.damping) if candidates[0] else {}
            masks = solve(problem, matrices, measured, _budgets(candidates[0], tallies, matrices, here), here)
        notes += masks.notes
    return Masks(matrices, masks.by_name, notes)


def shares(task: SolverTask) -> tuple[float, ...]:
    """How far to go towards one threshold on the saliency; several to try."""
    if not competes(task):
        return (0.0,)
    if task.scope == "global":
        return (1.0,)
    return CANDIDATES if task.solver.allocation == "auto" else (float(task.solver.allocation),)


def competes(task: SolverTask) -> bool:
    """Whether matrices compete for their zeros by what they cost in loss."""
    return task.level.nm is None and (task.scope == "global" or (task.scope == "auto" and task.solver.allocation != 0))


def _budgets(
    share: float, tallies: dict[str, torch.Tensor], matrices: Sequence[Matrix], task: SolverTask
) -> dict[str, int]:
    equal = equal_budgets(matrices, task.level, task.scope)
    return equal | (budgets_at(share, tallies, matrices, task.level) if share > 0 else {})


class _Tried(NamedTuple):
    loss: float
    share: float
    masks: Masks
    weights: dict[str, torch.Tensor]


def _best_of(
    candidates: Sequence[float], problem: Problem, held_out: Problem, matrices: Sequence[Matrix], task: SolverTask
) -> Masks:
    """Solve at every share, each from the weights that are there now, and leave the model at the one with the least
    loss on `held_out`. Two copies of this rank's pieces of the weights are kept."""
    measured = hessians(problem, matrices, hessian_options(task, True))
    tallies = saliency_tallies(problem, matrices, measured, task.damping)
    before, best, losses = pieces_of(problem, matrices), None, []
    for share in candidates:
        masks = solve(problem, matrices, measured, _budgets(share, tallies, matrices, task), task)
        loss = mean_loss(held_out, f"allocation {share:g}")
        losses.append(f"{share:g}: {loss:.4f}")
        if best is None or loss < best.loss:
            best = _Tried(loss, share, masks, pieces_of(problem, matrices))
        put_back(problem, matrices, before)
    put_back(problem, matrices, best.weights)
    note = f"allocation {best.share:g} chosen by held-out loss ({', '.join(losses)})"
    log.info(note)
    return Masks(matrices, best.masks.by_name, (*best.masks.notes, note))


def pieces_of(problem: Problem, matrices: Sequence[Matrix]) -> dict[str, torch.Tensor]:
    """Copies of this rank's pieces."""
    return {matrix.name: problem.backend.shard(problem.model, matrix).weight.clone() for matrix in matrices}


def put_back(problem: Problem, matrices: Sequence[Matrix], pieces: dict[str, torch.Tensor]) -> None:
    for matrix in matrices:
        problem.backend.write(problem.model, matrix, pieces[matrix.name])
