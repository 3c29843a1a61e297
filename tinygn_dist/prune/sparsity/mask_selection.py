"""Scores + budget -> masks: exactly the asked number, the same on every rank.

Ties go to the smaller index, so the outcome does not depend on the seed or the sharding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.overflow import refuse_overflow
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.counts import num_kept
from tinygn_dist.maths.top_k import keep_largest
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.prune.sparsity.levels import Level

FLOOR = 0.01
"""density that global competition leaves in every weight matrix: an emptied layer ends the model"""


def check_nm(matrices: Sequence[Matrix], m: int) -> None:
    """UserError when M does not divide a matrix's inputs, before anything is computed."""
    odd = [matrix for matrix in matrices if matrix.shape[1] % m]
    if odd:
        raise UserError(
            f"N:M with M={m} does not divide the {odd[0].shape[1]} inputs of {odd[0].name} ({len(odd)} such weights); "
            "use another M, or leave them dense with prune.ignore"
        )


def choose_masks(
    problem: Problem, matrices: Sequence[Matrix], scores: Mapping[str, torch.Tensor], level: Level, scope: str
) -> dict[str, torch.Tensor]:
    """Keep masks shaped like the scores, which are shaped like this rank's shards. scope: row, layer or global."""
    model, backend, sparsity = problem.model, problem.backend, level.sparsity
    _refuse_nonfinite(problem, matrices, scores)
    if level.nm is not None:
        return {
            t.name: backend.by_rows(model, t, scores[t.name], lambda rows: keep_n_of_m(rows, *level.nm))
            for t in matrices
        }
    if scope == "row":
        return {
            t.name: backend.by_rows(model, t, scores[t.name], lambda rows: keep_per_row(rows, sparsity))
            for t in matrices
        }
    if scope == "layer":
        return {t.name: _keep_in(model, [t], scores, num_kept(t.numel, sparsity), backend)[0] for t in matrices}
    return _keep_globally(model, matrices, scores, sparsity, backend)


def _refuse_nonfinite(problem: Problem, matrices: Sequence[Matrix], scores: Mapping[str, torch.Tensor]) -> None:
    """The same UserError on every rank when any rank's piece of a score is NaN or inf."""
    bad = next((t.name for t in matrices if not torch.isfinite(scores[t.name]).all()), None)
    rank = problem.backend.rank
    refuse_overflow(
        problem,
        None if bad is None else f"score of {bad} is NaN or inf on rank {rank}",
        "check the data and the weights",
    )


def keep_n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Mask of the n largest in each group of m consecutive inputs. scores: (rows, in), m divides in."""
    groups = scores.reshape(-1, m)
    order = groups.argsort(dim=1, descending=True, stable=True)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :n], True)
    return keep.view(scores.shape)


def keep_per_row(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Mask of the num_kept(in, sparsity) largest in each row."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.scatter_(1, order[:, : num_kept(scores.shape[1], sparsity)], True)


def _keep_globally(
    model: nn.Module, matrices: Sequence[Matrix], scores: Mapping[str, torch.Tensor], sparsity: float, backend: Backend
) -> dict[str, torch.Tensor]:
    floored = {}
    for matrix in matrices:  # the best few of every matrix are out of the competition
        (best,) = _keep_in(model, [matrix], scores, max(1, round(FLOOR * matrix.numel)), backend)
        floored[matrix.name] = scores[matrix.name].masked_fill(best, torch.inf)
    keep = num_kept(sum(matrix.numel for matrix in matrices), sparsity)
    masks = _keep_in(model, matrices, floored, keep, backend)
    return {matrix.name: mask for matrix, mask in zip(matrices, masks, strict=True)}


def _keep_in(
    model: nn.Module, matrices: Sequence[Matrix], scores: Mapping[str, torch.Tensor], keep: int, backend: Backend
) -> list[torch.Tensor]:
    starts, before = [], 0
    for matrix in matrices:
        starts.append(before + backend.shard(model, matrix).offset)
        before += matrix.numel
    return keep_largest([scores[matrix.name] for matrix in matrices], starts, keep, backend.sum_over_shards)
