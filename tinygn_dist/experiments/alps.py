"""ADMM on one linear layer (ALPS, Meng et al. 2024): the mask is found while the weights move, not column by column.

Minimise sum_o e_o ||(w_o - w'_o) X^T||^2 with at most so many entries, split into weights W that fit and weights D
that are sparse, with multipliers V and a penalty rho that grows until the mask of D stands still:

    W = (W0 H - V + rho D) (H + rho I)^-1,   D = the largest of W + V / rho,   V += rho (W - D).

Inputs are scaled to a unit diagonal of H, so one rho fits all; H is decomposed once. D's values are then re-fitted by
conjugate gradients. ADMM starts anew and may end in a worse mask than the sweep: both are solved, and the one with the
smaller error is taken (`--prune.solver.method admm`).

Figures: 80.3 against 76.7 of the sweep at 2:4, in three times the CPU time (docs/results.md). A perplexity below the
sweep's at the same CPU time would bring it in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from tinygn_dist.config import PruneConfig
from tinygn_dist.maths.counts import spread
from tinygn_dist.maths.solve import layer
from tinygn_dist.maths.solve.obs import LayerGoal, Solved, damped, drop_lowest, keep_n_of_m

FIRST_PENALTY, EVERY = 0.1, 3
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""factor of the penalty while more than this share of the kept entries changed since the last look"""


class SweepOrAdmm:
    """A row of SOLVERS, see `prune.sparsity.solve.LayerSolver`."""

    def check(self, options: PruneConfig) -> None:
        """ValueError where no weights are solved."""
        if options.unit_kinds or options.criterion not in ("auto", "obs"):
            raise ValueError(
                f"solver.method admm solves weights of criterion obs, got pattern {options.pattern} and criterion "
                f"{options.criterion}"
            )

    def solve(self, weight: torch.Tensor, hessian: torch.Tensor, goal: LayerGoal, refine: int) -> Solved:
        """Extras: by_admm, bool, whether ADMM's mask had the smaller error."""
        swept = layer.solve(weight, hessian, goal, refine)
        other = prune(weight, hessian, replace(goal, damping=swept.damping))
        other = layer.refitted(weight, hessian, other, refine)
        errors = [layer.error(weight, one.weight, hessian, goal.row_energy) for one in (other, swept)]
        better = errors[0] < errors[1]
        return replace(other if better else swept, extras={"by_admm": torch.tensor(better)})

    def notes(self, extras: Mapping[str, Mapping[str, torch.Tensor]]) -> tuple[str, ...]:
        """How often ADMM's mask was taken. extras: by matrix."""
        better = sum(int(each["by_admm"]) for each in extras.values())
        return (f"ADMM's mask had the smaller error on {better} of {len(extras)} weights, the sweep's on the rest",)


SOLVERS = {"admm": SweepOrAdmm()}


def prune(weight: torch.Tensor, hessian: torch.Tensor, goal: LayerGoal, iterations: int = 300) -> Solved:
    """Arguments and result as of `obs.prune`. iterations: the most there may be; the mask usually stands still
    before."""
    solid = damped(hessian.float(), goal.damping)
    scale = solid.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(solid / scale[:, None] / scale)
    dense = weight.float() * scale
    dense[:, hessian.diagonal() <= 0] = 0  # their inputs are always zero: removing them changes nothing
    wanted = (dense @ vectors) * values @ vectors.t()
    penalty, pull, sparse = FIRST_PENALTY, torch.zeros_like(dense), dense
    keep = seen = torch.ones_like(dense, dtype=torch.bool)
    for turn in range(1, iterations + 1):
        fitted = ((wanted - pull + penalty * sparse) @ vectors) / (values + penalty) @ vectors.t()
        matrix = fitted + pull / penalty
        keep = _largest(matrix.square(), goal)
        sparse = matrix.masked_fill(~keep, 0)
        pull += penalty * (fitted - sparse)
        if turn % EVERY == 0:
            changed = int((keep & ~seen).sum() + (seen & ~keep).sum()) / max(1, int(keep.sum()))
            if changed == 0:
                break
            penalty *= next(factor for least, factor in GROWTH if changed >= least)
            seen = keep
    return Solved((sparse / scale).masked_fill_(~keep, 0), keep, goal.damping)


def _largest(size: torch.Tensor, goal: LayerGoal) -> torch.Tensor:
    """Keep mask of the largest, exactly as many as asked for."""
    if goal.nm is not None:
        n, m = goal.nm
        return keep_n_of_m(size.view(-1, m), n).view(size.shape)
    if goal.per_row:
        return drop_lowest(size, spread(goal.num_pruned, [1] * len(size)))
    return drop_lowest(size if goal.row_energy is None else size * goal.row_energy[:, None], goal.num_pruned)
