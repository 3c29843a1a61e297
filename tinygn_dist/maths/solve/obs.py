"""Optimal-brain-surgeon pruning of one linear layer: mask and compensating update together (SparseGPT).

Minimise ||(W - W') X^T||^2 over masks and kept values. Columns are visited left to right; the error of a pruned entry
is pushed onto the columns still to come through the Cholesky factor of the inverse Hessian (Frantar & Alistarh 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tinygn_dist.maths.counts import spread


@dataclass(frozen=True)
class LayerGoal:
    """What is asked of one matrix.

    num_pruned: exactly this many entries go (ignored for N:M). nm: keep n of every m inputs. per_row: every row
    loses the same number. row_energy: (out,) gradient energy of the layer's outputs, which weights the rows'
    saliency against each other. damping: added to the Hessian's diagonal, as a fraction of its mean.
    """

    num_pruned: int
    nm: tuple[int, int] | None = None
    per_row: bool = False
    row_energy: torch.Tensor | None = None
    damping: float = 0.01


@dataclass(frozen=True)
class Solved:
    """weight: (out, in) fp32, exactly zero where keep is False. keep: (out, in) bool. damping: the fraction that was
    added in the end. extras: facts of the method, small tensors by name."""

    weight: torch.Tensor
    keep: torch.Tensor
    damping: float
    extras: dict[str, torch.Tensor] = field(default_factory=dict)


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Hessian with dead inputs (zero diagonal) given the mean diagonal, and damping * mean(diagonal) added to the
    others."""
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
    """Upper Cholesky factor U of the inverse, H^-1 = U^T U, and the damping that made it possible (see `cholesky`).

    With the inputs in reverse order the lower factor of H is an upper one, H = R R^T, and U = R^-1: one
    factorisation, and the inverse itself is never there.
    """
    attempt = damping
    while True:
        lower, attempt = cholesky(hessian.flip(0, 1), attempt)
        upper = _inverse_of_upper(lower.flip(0, 1))
        if upper.isfinite().all():
            return upper, attempt
        attempt *= 10


def _inverse_of_upper(upper: torch.Tensor, leaf: int = 128) -> torch.Tensor:
    """By halves, so that most of the work is matrix products: [[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0,
    C^-1]]."""
    size = len(upper)
    if size <= leaf:
        return torch.linalg.solve_triangular(upper, torch.eye(size, dtype=upper.dtype, device=upper.device), upper=True)
    half = size // 2
    result = torch.zeros_like(upper)
    result[:half, :half] = first = _inverse_of_upper(upper[:half, :half])
    result[half:, half:] = last = _inverse_of_upper(upper[half:, half:])
    result[:half, half:] = (first @ upper[:half, half:]).neg_() @ last
    return result


def prune(weight: torch.Tensor, hessian: torch.Tensor, goal: LayerGoal, block_size: int = 128) -> Solved:
    """Prune one weight and update what is kept.

    weight: (out, in). hessian: (in, in) fp32 sum over tokens of x x^T. Pruned entries are exactly zero; dead inputs go
    first, at no cost.
    """
    nm = goal.nm
    # (in, out): what is visited one after the other is a run of memory each
    work = weight.float().t().clone(memory_format=torch.contiguous_format)
    num_inputs, out = work.shape
    work[hessian.diagonal() <= 0] = 0  # their inputs are always zero: removing them changes nothing
    factor, used = inverse_factor(hessian.float(), goal.damping)
    keep = torch.ones_like(work, dtype=torch.bool)
    group = 1 if nm is None else nm[1]
    block_size = max(group, block_size - block_size % group)  # a group of M must not be cut
    starts = list(range(0, num_inputs, block_size))
    sizes = [min(block_size, num_inputs - start) for start in starts]
    areas = [out * size for size in sizes]
    quota = _row_quotas(goal.num_pruned, out, sizes) if goal.per_row else spread(goal.num_pruned, areas)
    for start, size, quota_here in zip(starts, sizes, quota, strict=True):
        block, stays = work[start : start + size], keep[start : start + size]
        upper = factor[start : start + size, start : start + size]
        if nm is None:
            saliency = block.t().square() / upper.diagonal().square()
            if goal.row_energy is not None:
                saliency *= goal.row_energy[:, None]
            stays.copy_(drop_lowest(saliency, quota_here).t())
        errors = _sweep(block, stays, upper, nm)
        work[start + size :].addmm_(factor[start : start + size, start + size :].t(), errors, alpha=-1)
    return Solved(work.masked_fill_(~keep, 0).t().contiguous(), keep.t().contiguous(), used)


def _sweep(
    block: torch.Tensor, keep: torch.Tensor, upper: torch.Tensor, nm: tuple[int, int] | None, panel: int = 32
) -> torch.Tensor:
    """Visit the inputs of a block, (inputs, out) in place, and return the errors (inputs, out) to push onto the inputs
    behind it. keep: which entries stay; for N:M found here, group by group. An input's error is pushed onto its
    panel at once, and onto the rest of the block together with the panel's."""
    size, scale = len(block), upper.diagonal()[:, None]
    gone, errors = (~keep).float().div_(scale), torch.empty_like(block)
    panel = panel if nm is None else max(nm[1], panel - panel % nm[1])
    for first in range(0, size, panel):
        last = min(first + panel, size)
        for at in range(first, last):
            if nm is not None and at % nm[1] == 0:
                group = slice(at, at + nm[1])
                saliency = (block[group] / scale[group]).square().t()
                keep[group] = keep_n_of_m(saliency, nm[0]).t()
                gone[group] = (~keep[group]).float().div_(scale[group])
            error = torch.mul(block[at], gone[at], out=errors[at])
            block[at:last].addr_(upper[at, at:last], error, alpha=-1)
        block[last:].addmm_(upper[first:last, last:].t(), errors[first:last], alpha=-1)
    return errors


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
