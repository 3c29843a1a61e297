"""The layer solver on a whole model: measure, budget, solve, in a row and once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from tinygn_dist.backends.pieces import Edited, Extras, Job
from tinygn_dist.config import PruneConfig, SolverConfig
from tinygn_dist.config.experiments import Options
from tinygn_dist.estimate.hessians import PLAIN, PLAIN_NM, HessianOptions, Hessians
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.solve import layer
from tinygn_dist.maths.solve.obs import LayerGoal, Solved
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.prune.sparsity.budgets import loss_per_error
from tinygn_dist.prune.sparsity.levels import Level
from tinygn_dist.prune.sparsity.masks import Masks
from tinygn_dist.registry import experimental

log = logging.getLogger(__name__)


class LayerSolver(Protocol):
    """A row of SOLVERS: one matrix from its dense weight to mask and updated weight."""

    def solve(self, weight: torch.Tensor, hessian: torch.Tensor, goal: LayerGoal, refine: int) -> Solved:
        """weight: (out, in). hessian: (in, in) fp32. refine: conjugate gradient iterations on the kept weights.
        Pure."""

    def notes(self, extras: Mapping[str, Extras]) -> tuple[str, ...]:
        """For the report, from the extras of all matrices."""


class Sweep:
    """The sweep of SparseGPT, then a fit of the kept weights."""

    solve = staticmethod(layer.solve)

    def notes(self, extras: Mapping[str, Extras]) -> tuple[str, ...]:
        return ()


SOLVERS: dict[str, LayerSolver] = {"obs": Sweep()}


def layer_solver(name: str) -> LayerSolver:
    return SOLVERS[name] if name in SOLVERS else experimental("SOLVERS", LayerSolver)[name]


@dataclass(frozen=True)
class SolverTask:
    """One pass of the solver over a model.

    level: how sparse the model is after it. backprop: tokens and rows are weighed by gradient energy. scope, damping,
    solver, experiments: as of `PruneConfig`. held_out_sequences: as many choose between budgets.
    """

    level: Level
    backprop: bool
    scope: str = "auto"
    damping: float = 0.01
    solver: SolverConfig = SolverConfig()
    experiments: Options = field(default_factory=dict)
    held_out_sequences: int = 8


def task_of(options: PruneConfig, level: Level, backprop: bool) -> SolverTask:
    return SolverTask(
        level, backprop, options.scope, options.damping, options.solver, options.experiments, options.probes.samples
    )


def hessian_options(task: SolverTask, competing: bool) -> HessianOptions:
    """competing: matrices compete for their zeros by what they cost in loss, which asks for the energies of their
    rows."""
    plain = PLAIN_NM if task.level.nm else PLAIN
    return HessianOptions(task.solver.gram_gib, task.backprop, plain, competing, _pattern(task.level))


def _pattern(level: Level) -> str:
    return str(level) if level.nm else f"unstructured {level}"


def solve(
    problem: Problem, matrices: Sequence[Matrix], measured: Hessians, pruned: Mapping[str, int], task: SolverTask
) -> Masks:
    """Masks, and the new weights in the model. pruned: how many entries of each matrix go. Whole rows of a matrix are
    solved by one rank. A collective."""
    method = layer_solver(task.solver.method)

    def solve_job(job: Job, weights: list[torch.Tensor]) -> list[Edited]:
        hessian = job.moments[0].float()
        if _is_unreached(job):  # with the identity the solver keeps the largest
            hessian = torch.eye(len(hessian), device=hessian.device)
            warn_unreached(job.matrices)
        edited = []
        for index, (matrix, weight) in enumerate(zip(job.matrices, weights, strict=True)):
            per_row, energy = task.scope == "row", loss_per_error(job, index)
            goal = LayerGoal(pruned[matrix.name], task.level.nm, per_row, energy, task.damping)
            found = method.solve(weight, hessian, goal, task.solver.refine)
            if found.damping > task.damping:
                log.warning("%s: damping raised to %g to factorise its Hessian", matrix.name, found.damping)
            edited.append(Edited(found.weight, {"mask": found.keep} | found.extras))
        return edited

    extras: dict[str, Extras] = {}
    for jobs in measured.jobs(solving=True):
        extras |= problem.backend.map_matrices(problem.model, jobs, solve_job)
    masks = {name: each["mask"] for name, each in extras.items()}
    return Masks(matrices, masks, (*measured.notes, *method.notes(extras)))


def _is_unreached(job: Job) -> bool:
    return job.matrices[0].index is not None and not job.moments[0].any()


def warn_unreached(experts: Iterable[Matrix]) -> None:
    unreached: dict[str, set[int]] = {}
    for matrix in experts:
        unreached.setdefault(matrix.module, set()).add(matrix.index)
    for module, indices in unreached.items():
        never = sorted(indices)
        log.warning("no calibration token reached experts %s of %s: they are pruned by magnitude", never, module)
