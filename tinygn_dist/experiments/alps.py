"""ADMM on one linear layer (ALPS, Meng et al. 2024): the mask is found while the weights move, not column by column.

Minimise sum_o e_o ||(w_o - w'_o) X^T||^2 with at most so many entries, split into weights W that fit and weights D that are
sparse, with multipliers V and a penalty rho that grows until the mask of D stands still:

    W = (W0 H - V + rho D) (H + rho I)^-1,   D = the largest of W + V / rho,   V += rho (W - D).

Inputs are scaled to a unit diagonal of H, so one rho fits all; H is decomposed once. D's values are then re-fitted by
conjugate gradients (`least_squares.refit_masked`), which is the caller's to do, as after `obs.prune`.
"""

from __future__ import annotations

import torch

from tinygn_dist.maths.counts import spread
from tinygn_dist.maths.solve.obs import Solved, damped, drop_lowest, keep_n_of_m

FIRST_PENALTY, EVERY = 0.1, 3
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""factor of the penalty while more than this share of the kept entries changed since the last look"""


def prune(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    num_pruned: int,
    *,
    nm: tuple[int, int] | None = None,
    per_row: bool = False,
    row_energy: torch.Tensor | None = None,
    damping: float = 0.01,
    iterations: int = 300,
) -> Solved:
    """Arguments and result as of `obs.prune`. iterations: the most there may be; the mask usually stands still before."""
    solid = damped(hessian.float(), damping)
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
        keep = _largest(matrix.square(), num_pruned, nm, per_row, row_energy)
        sparse = matrix.masked_fill(~keep, 0)
        pull += penalty * (fitted - sparse)
        if turn % EVERY == 0:
            changed = int((keep & ~seen).sum() + (seen & ~keep).sum()) / max(1, int(keep.sum()))
            if changed == 0:
                break
            penalty *= next(factor for least, factor in GROWTH if changed >= least)
            seen = keep
    return Solved((sparse / scale).masked_fill_(~keep, 0), keep, damping)


def _largest(
    size: torch.Tensor,
    num_pruned: int,
    nm: tuple[int, int] | None,
    per_row: bool,
    row_energy: torch.Tensor | None,
) -> torch.Tensor:
    """Keep mask of the largest, exactly as many as asked for."""
    if nm is not None:
        return keep_n_of_m(size.view(-1, nm[1]), nm[0]).view(size.shape)
    if per_row:
        return drop_lowest(size, spread(num_pruned, [1] * len(size)))
    return drop_lowest(size if row_energy is None else size * row_energy[:, None], num_pruned)
