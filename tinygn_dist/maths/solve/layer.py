"""One linear layer from its dense weight to the sparse one: a mask, then the kept weights re-fitted."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from tinygn_dist.experiments import alps
from tinygn_dist.maths.solve import least_squares, obs

Solver = Literal["obs", "admm"]


class SolvedLayer(NamedTuple):
    weight: torch.Tensor
    """(out, in) fp32, exactly zero where keep is False"""
    keep: torch.Tensor
    """(out, in) bool"""
    damping: float
    """what was added to the Hessian's diagonal in the end, as a fraction of its mean"""
    solver: Solver
    """whose mask it is"""


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    num_pruned: int,
    *,
    solver: Solver,
    refine: int,
    nm: tuple[int, int] | None = None,
    per_row: bool = False,
    row_energy: torch.Tensor | None = None,
    damping: float = 0.01,
) -> SolvedLayer:
    """Arguments as of `obs.prune`. refine: conjugate gradient iterations on the kept weights.

    ADMM starts anew and may end in a worse mask than the sweep: both are solved, and the one with the smaller `error`
    taken.
    """
    asked = dict(nm=nm, per_row=per_row, row_energy=row_energy)

    def fitted(found: obs.Solved, name: Solver) -> SolvedLayer:
        again = least_squares.refit_masked(weight, found.weight, found.keep, hessian, refine, found.damping)
        return SolvedLayer(again, found.keep, found.damping, name)

    swept = fitted(obs.prune(weight, hessian, num_pruned, damping=damping, **asked), "obs")
    if solver == "obs":
        return swept
    other = fitted(alps.prune(weight, hessian, num_pruned, damping=swept.damping, **asked), "admm")
    best = error(weight, other.weight, hessian, row_energy) < error(weight, swept.weight, hessian, row_energy)
    return other if best else swept


def error(
    dense: torch.Tensor, sparse: torch.Tensor, hessian: torch.Tensor, row_energy: torch.Tensor | None = None
) -> float:
    """sum_o e_o (w_o - w'_o) H (w_o - w'_o)^T, with e_o = 1 by default; in fp64."""
    away = (dense - sparse).double()
    by_row = ((away @ hessian.double()) * away).sum(1)
    return float(by_row.sum() if row_energy is None else by_row @ row_energy.double())
