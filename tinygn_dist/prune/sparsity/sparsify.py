"""Weight patterns (unstructured, N:M): estimate what the criterion needs, score, select, and for `obs` solve."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from tinygn_dist.backends.pieces import Edited, Job
from tinygn_dist.config import DEFAULT_SHARE, NM, PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.estimator import resolve_estimator
from tinygn_dist.estimate.hessians import LayerStatistics, gram_gib, layer_groups, measure
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.experiments import evopress
from tinygn_dist.experiments.evopress import HeldOut
from tinygn_dist.maths import criteria
from tinygn_dist.maths.counts import num_kept
from tinygn_dist.maths.criteria import CRITERIA
from tinygn_dist.maths.schedules import sparsity_between
from tinygn_dist.maths.solve import layer
from tinygn_dist.models.anatomy import Anatomy, Matrix
from tinygn_dist.prune.sparsity import budgets as layer_budgets
from tinygn_dist.prune.sparsity.mask_selection import check_nm, choose_masks
from tinygn_dist.prune.sparsity.masks import Masks
from tinygn_dist.prune.sparsity.weight_scores import scores
from tinygn_dist.runtime.cpu_matmul import fast_matmul

log = logging.getLogger(__name__)


def check(anatomy: Anatomy, matrices: Sequence[Matrix], options: PruneConfig) -> None:
    """UserError, before anything is computed, for what cannot be done with these weights."""
    if options.nm:
        check_nm(matrices, options.nm.m)
    if options.criterion not in ("auto", "obs"):
        return
    if len(layer_groups(anatomy, matrices, options.gram_gib)) > 1 and options.allocation == "search":
        raise UserError(
            f"allocation search solves all layers from one measurement, whose Gram matrices take {gram_gib(matrices):.3g} GiB; "
            f"raise prune.gram_gib ({options.gram_gib:g}), or use allocation auto"
        )


def sparsify(problem: Problem, matrices: Sequence[Matrix], options: PruneConfig) -> Masks:
    """Choose masks and apply them to the live weights (criterion obs also updates what is kept)."""
    criterion = "obs" if options.criterion == "auto" else options.criterion
    with fast_matmul(problem.backend.device):
        if criterion == "obs":
            masks = _solve_in_passes(problem, matrices, options)
        else:
            masks = _choose(problem, matrices, scores(problem, matrices, criterion, options.seed), criterion, options)
    chosen = Masks(matrices, masks)
    chosen.apply_(problem.model, problem.backend)
    return chosen


def _solve_in_passes(problem: Problem, matrices: Sequence[Matrix], options: PruneConfig) -> dict[str, torch.Tensor]:
    held = round(min(gram_gib(matrices), options.gram_gib) * 2**30)
    options = resolve_estimator(problem, options, held)
    held_out = None
    if options.allocation == "search":  # the dense model is what it compares with, in the last pass too
        problem, rest = problem.split(options.search_samples)
        held_out = evopress.hold_out(rest)
    for asked in solver_passes(options):
        masks = _solve(problem, matrices, asked, held_out)
    return masks


def solver_passes(options: PruneConfig) -> list[PruneConfig]:
    """What each pass of the solver is asked for: the same share of what is left goes each time, in as many passes as asked,
    or as it takes that no pass removes more than half."""
    final = 1 - options.nm.n / options.nm.m if options.nm else options.sparsity
    count = options.passes or max(1, math.ceil(math.log2(1 / (1 - final)) - 1e-9))
    plain = options if options.allocation != "search" else options.model_copy(update={"allocation": DEFAULT_SHARE})
    on_the_way = [at_sparsity(plain, sparsity_between("iterative", 0.0, final, k / count)) for k in range(1, count)]
    steps = [*filter(None, on_the_way), options]
    return list({(step.pattern, step.sparsity): step for step in steps}.values())  # N:M has few steps


def at_sparsity(options: PruneConfig, sparsity: float) -> PruneConfig | None:
    """The same options at a sparsity on the way, None for nothing. N:M goes down from M:M in whole steps."""
    if options.nm is None:
        return options.model_copy(update={"sparsity": sparsity}) if sparsity > 0 else None
    n = max(options.nm.n, num_kept(options.nm.m, sparsity))
    return options.model_copy(update={"pattern": "{}:{}".format(*NM(n, options.nm.m))}) if n < options.nm.m else None


def _choose(
    problem: Problem, matrices: Sequence[Matrix], scored: dict[str, torch.Tensor], criterion: str, options: PruneConfig
) -> dict[str, torch.Tensor]:
    """Masks by scores; experts without any are pruned by magnitude, each to the same sparsity on its own: where the
    whole model competes, scores of another scale would empty them or spare them."""

    def masks(among: Sequence[Matrix], within: str, sparsity: float = options.sparsity) -> dict[str, torch.Tensor]:
        return choose_masks(
            problem.model,
            among,
            scored,
            sparsity=sparsity,
            scope=within,
            nm=options.nm,
            backend=problem.backend,
        )

    scope = CRITERIA[criterion].scope if options.scope == "auto" else options.scope
    reached = not CRITERIA[criterion].needs_data
    alone = {} if reached else {t.name: t for t in _unreached(problem, matrices, scored)}
    _warn_unreached(alone.values())
    for name, matrix in alone.items():
        scored[name] = criteria.magnitude(problem.backend.shard(problem.model, matrix).weight)
    if options.allocation == "owl":
        going = _outlier_budgets(problem, matrices, options)
        return {n: m for t in matrices for n, m in masks([t], scope, going[t.name] / t.numel).items()}
    together = [matrix for matrix in matrices if scope != "global" or matrix.name not in alone]
    apart = list(alone.values()) if scope == "global" else []
    return {k: m for among, s in ((together, scope), (apart, "layer")) if among for k, m in masks(among, s).items()}


def _unreached(problem: Problem, matrices: Sequence[Matrix], scores: dict[str, torch.Tensor]) -> list[Matrix]:
    """Experts that no calibration token reached, whose scores are all zero: those say nothing about them."""
    experts = [matrix for matrix in matrices if matrix.index is not None]
    nonzero = torch.tensor([int(torch.count_nonzero(scores[t.name])) for t in experts], dtype=torch.int64)
    nonzero = problem.backend.sum_over_shards(nonzero).tolist() if experts else []
    return [matrix for matrix, count in zip(experts, nonzero, strict=True) if count == 0]


def _warn_unreached(matrices: Iterable[Matrix]) -> None:
    unreached: dict[str, set[int]] = {}
    for matrix in matrices:
        unreached.setdefault(matrix.module, set()).add(matrix.index)
    for module, experts in unreached.items():
        never = sorted(experts)
        log.warning("no calibration token reached experts %s of %s: they are pruned by magnitude", never, module)


def _solve(
    problem: Problem, matrices: Sequence[Matrix], options: PruneConfig, held_out: HeldOut | None
) -> dict[str, torch.Tensor]:
    """Masks and updates by the layer solver, at the budgets asked for or at the best of several. held_out: for a search."""
    shares = layer_budgets.shares(options)
    trial: Problem | None = None
    if len(shares) > 1:
        problem, trial = problem.split(options.probe_samples)
    measured = measure(problem, matrices, options)

    def budgets(share: float) -> dict[str, int]:
        pruned = {matrix.name: _num_pruned(matrix, options) for matrix in matrices}
        if options.allocation == "owl":
            return _outlier_budgets(problem, matrices, options)
        return pruned | (layer_budgets.allocate(problem, matrices, measured, options, share) if share > 0 else {})

    def solved(pruned: Mapping[str, int]) -> dict[str, torch.Tensor]:
        return _solved(problem, measured, options, pruned)

    if options.allocation == "search":
        asked = dict(generations=options.search_generations, seed=options.seed)
        return evopress.search(held_out, matrices, budgets(shares[0]), solved, **asked)
    if trial:
        return layer_budgets.best_of(shares, trial, matrices, lambda share: solved(budgets(share)))
    return solved(budgets(shares[0]))


def _outlier_budgets(problem: Problem, matrices: Sequence[Matrix], options: PruneConfig) -> dict[str, int]:
    return layer_budgets.by_outliers(problem, matrices, scores(problem, matrices, "wanda"), options)


def _solved(
    problem: Problem, measured: LayerStatistics, options: PruneConfig, pruned: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Whole rows of each matrix are solved by one rank. pruned: how many entries of each matrix go."""

    def solve(job: Job, weights: list[torch.Tensor]) -> list[Edited]:
        results, hessian = [], job.moments[0].float()
        if _is_unreached(job):  # with the identity the solver keeps the largest
            hessian = torch.eye(len(hessian), device=hessian.device)
            _warn_unreached(job.matrices)
        for index, (matrix, weight) in enumerate(zip(job.matrices, weights, strict=True)):
            solved = layer.solve(
                weight,
                hessian,
                pruned[matrix.name],
                solver=options.solver,
                refine=options.refine,
                nm=options.nm,
                per_row=options.scope == "row",
                row_energy=layer_budgets.loss_per_error(job, index),
                damping=options.damping,
            )
            if solved.damping > options.damping:
                log.warning("%s: damping raised to %g to factorise its Hessian", matrix.name, solved.damping)
            by_admm = torch.tensor(solved.solver == "admm")
            results.append(Edited(solved.weight, {"mask": solved.keep, "by_admm": by_admm}))
        return results

    masks: dict[str, torch.Tensor] = {}
    better = 0
    for jobs in measured.jobs(solving=True):
        for name, extras in problem.backend.map_matrices(problem.model, jobs, solve).items():
            masks[name] = extras["mask"]
            better += int(extras["by_admm"])
    if options.solver == "admm":
        problem.notes.append(
            f"ADMM's mask had the smaller error on {better} of {len(masks)} weights, the sweep's on the rest"
        )
    return masks


def _is_unreached(job: Job) -> bool:
    return job.matrices[0].index is not None and not job.moments[0].any()


def _num_pruned(matrix: Matrix, options: PruneConfig) -> int:
    rows, size = matrix.shape if options.scope == "row" else (1, matrix.numel)
    return rows * (size - num_kept(size, options.sparsity))
