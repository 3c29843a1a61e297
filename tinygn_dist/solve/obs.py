"""Optimal-brain-surgeon pruning of one linear layer: mask and compensating update together (SparseGPT).

Minimise ||(W - W') X^T||^2 over masks and kept values. Columns are visited left to right; the error of a pruned entry
is pushed onto the columns still to come through the Cholesky factor of the inverse Hessian (Frantar & Alistarh 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tinygn_dist.budget import spread


class Solved(NamedTuple):
    weight: torch.Tensor
    """(out, in) fp32, exactly zero where keep is False"""
    keep: torch.Tensor
    """(out, in) bool"""
    damping: float
    """what was added to the diagonal in the end, as a fraction of its mean"""


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Hessian with dead inputs (zero diagonal) given the mean diagonal, and damping * mean(diagonal) added to the others."""
    result = hessian.clone()
    diagonal = result.diagonal()
    alive = diagonal > 0
    mean = diagonal[alive].mean() if alive.any() else torch.ones((), dtype=result.dtype)
    diagonal.add_(damping * mean)
    diagonal[~alive] = mean
    return result


def cholesky(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Lower Cholesky factor of the damped Hessian, and the damping that made it possible.

    Damping grows tenfold until the factorisation succeeds. Raises ValueError when even damping 1 does not help.
    """
    attempt = damping
    while attempt <= 1:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, attempt))
        if not failed:
            return lower, attempt
        attempt *= 10
    raise ValueError("the Hessian is not positive definite even with damping 1; its inputs hold NaN or inf")


def inverse_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Upper Cholesky factor U of the inverse, H^-1 = U^T U, and the damping that made it possible (see `cholesky`)."""
    attempt = damping
    while True:
        lower, attempt = cholesky(hessian, attempt)
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper, attempt
        attempt *= 10


def prune(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    num_pruned: int,
    *,
    nm: tuple[int, int] | None = None,
    per_row: bool = False,
    row_energy: torch.Tensor | None = None,
    damping: float = 0.01,
    block_size: int = 128,
) -> Solved:
    """Prune one weight and update what is kept.

    weight: (out, in). hessian: (in, in) fp32 sum over tokens of x x^T. num_pruned: exactly this many entries go
    (ignored for N:M). nm: keep n of every m inputs. per_row: every row loses the same number. row_energy: (out,)
    gradient energy of the layer's outputs, which weights the rows' saliency against each other. Pruned entries are
    exactly zero; dead inputs go first, at no cost.
    """
    work = weight.float().clone()
    out, num_inputs = work.shape
    work[:, hessian.diagonal() <= 0] = 0  # their inputs are always zero: removing them changes nothing
    factor, used = inverse_factor(hessian.float(), damping)
    keep = torch.ones_like(work, dtype=torch.bool)
    if nm is not None:
        block_size = max(nm[1], block_size - block_size % nm[1])  # a group of M must not be cut
    starts = list(range(0, num_inputs, block_size))
    sizes = [min(block_size, num_inputs - start) for start in starts]
    quota = _row_quotas(num_pruned, out, sizes) if per_row else spread(num_pruned, [out * size for size in sizes])
    for start, size, quota_here in zip(starts, sizes, quota, strict=True):
        stop = start + size
        block, upper = work[:, start:stop].clone(), factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        if nm is None:
            saliency = block.square() / upper.diagonal().square()
            if row_energy is not None:
                saliency *= row_energy[:, None]
            keep[:, start:stop] = drop_lowest(saliency, quota_here)
        for column in range(size):
            if nm is not None and column % nm[1] == 0:
                group = slice(column, column + nm[1])
                saliency = block[:, group].square() / upper.diagonal()[group].square()
                keep[:, start + column : start + column + nm[1]] = keep_n_of_m(saliency, nm[0])
            kept = keep[:, start + column]
            error = block[:, column].masked_fill(kept, 0) / upper[column, column]
            errors[:, column] = error
            block[:, column:].addr_(error, upper[column, column:], alpha=-1)
            block[:, column].masked_fill_(~kept, 0)
        work[:, start:stop] = block
        work[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return Solved(work.masked_fill_(~keep, 0), keep, used)


def saliency(weight: torch.Tensor, hessian: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """w^2 / (2 [H^-1]_qq): loss of the layer's output when one weight goes and the others adapt. (out, in)."""
    factor, _ = inverse_factor(hessian.float(), damping)
    return weight.float().square() / (2 * factor.square().sum(0))


def _row_quotas(num_pruned: int, rows: int, sizes: Sequence[int]) -> list[list[int]]:
    """Per block of columns, how many entries of each row go: every row loses the same number in all (give or
    take one where it does not divide)."""
    by_row = [spread(lost, sizes) for lost in spread(num_pruned, [1] * rows)]
    return [list(block) for block in zip(*by_row, strict=True)]


def drop_lowest(saliency: torch.Tensor, num_pruned: int | list[int]) -> torch.Tensor:
    """Keep mask with exactly num_pruned False, or that many False in each row."""
    if isinstance(num_pruned, int):
        flat = saliency.flatten()
        keep = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
        if num_pruned:
            last = flat.topk(num_pruned, largest=False, sorted=False).values.max()
            keep = flat > last
            ties = (flat == last).nonzero()[:, 0]  # the first of them go
            keep[ties[num_pruned - int((flat < last).sum()) :]] = True
        return keep.view_as(saliency)
    rank = saliency.argsort(dim=1, stable=True).argsort(1)
    return rank >= torch.tensor(num_pruned, device=saliency.device)[:, None]


def keep_n_of_m(saliency: torch.Tensor, n: int) -> torch.Tensor:
    """Mask of the n largest in each row of (groups, m)."""
    rank = saliency.argsort(dim=1, descending=True, stable=True).argsort(1)
    return rank < n
