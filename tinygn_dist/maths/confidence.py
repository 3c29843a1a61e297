"""How sure is a mean over sequences? Standard errors of losses per token, and deviates of Student's t."""

from __future__ import annotations

import torch


def ratio_mean(differences: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean difference per token and its standard error over sequences (ratio estimator).

    differences: (probes, sequences) fp64 differences of summed losses. counts: (sequences,).
    The error is inf with one sequence, where it cannot be known.
    """
    num, total = differences.shape[1], counts.sum()
    mean = differences.sum(1) / total
    if num < 2:
        return mean, torch.full_like(mean, torch.inf)
    residual = differences - mean[:, None] * counts
    return mean, (residual.square().sum(1) * num / (num - 1)).sqrt() / total


def paired(differences: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much probe b's mean difference per token is larger than probe a's, at [a, b], and the standard error over
    the sequences that both saw (inf with one).

    differences: (probes, sequences) fp64 differences of summed losses. counts: (sequences,).
    """
    num, total = differences.shape[1], counts.sum()
    mean = differences.sum(1) / total
    if num < 2:
        return mean[None] - mean[:, None], torch.full((len(mean), len(mean)), torch.inf, dtype=mean.dtype)
    residual = differences - mean[:, None] * counts
    products = residual @ residual.t()
    squares = products.diag()[:, None] + products.diag()[None] - 2 * products
    return mean[None] - mean[:, None], (squares.clamp(min=0) * num / (num - 1)).sqrt() / total


def normal_of_t(t: torch.Tensor, freedom: int) -> torch.Tensor:
    """The standard normal deviate that is as rare as Student's t (Wallace 1959: within 5 % with one degree of freedom,
    0.5 % with four). 0 where there is no degree of freedom."""
    far = (freedom * torch.log1p(t.square() / max(freedom, 1))).sqrt()
    return (8 * freedom + 1) / (8 * freedom + 3) * far * t.sign()
