"""One linear layer from its dense weight to the sparse one: a mask, then the kept weights re-fitted."""

from __future__ import annotations

from dataclasses import replace

import torch

from tinygn_dist.maths.solve import least_squares, obs
from tinygn_dist.maths.solve.obs import LayerGoal, Solved


def solve(weight: torch.Tensor, hessian: torch.Tensor, goal: LayerGoal, refine: int) -> Solved:
    """The sweep of `obs.prune`, then `refine` conjugate gradient iterations on the kept weights."""
    return refitted(weight, hessian, obs.prune(weight, hessian, goal), refine)


def refitted(weight: torch.Tensor, hessian: torch.Tensor, found: Solved, refine: int) -> Solved:
    """The same mask with the kept weights closer to the dense output."""
    again = least_squares.refit_masked(weight, found.weight, found.keep, hessian, refine, found.damping)
    return replace(found, weight=again)


def error(
    dense: torch.Tensor, sparse: torch.Tensor, hessian: torch.Tensor, row_energy: torch.Tensor | None = None
) -> float:
    """sum_o e_o (w_o - w'_o) H (w_o - w'_o)^T, with e_o = 1 by default; in fp64."""
    away = (dense - sparse).double()
    by_row = ((away @ hessian.double()) * away).sum(1)
    return float(by_row.sum() if row_energy is None else by_row @ row_energy.double())
