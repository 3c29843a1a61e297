"""Removing whole input features of a linear layer: which ones, and the best weights for those that stay.

With G = X^T X over the calibration tokens and kept inputs K, the weights that come closest to the dense output are
W' = W G[:, K] (G[K, K] + lambda I)^-1 (normal equations of min ||X W^T - X_K W'^T||^2).
"""

from __future__ import annotations

import torch

from tinygn_dist.maths.counts import spread
from tinygn_dist.maths.solve.obs import cholesky, damped


def refit(
    weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, damping: float, more: torch.Tensor | None = None
) -> torch.Tensor:
    """(out, len(kept)) fp32 weights re-fitted on the kept inputs. weight (out, in), gram (in, in), kept (k,) int64.

    more: (out, in) fp32 sum of y x^T, where y is to be given besides. The damping pulls towards the present weights,
    not towards zero, so that keeping everything changes nothing.
    """
    solver, ridge = _solver(gram, kept, damping)
    wanted = weight.float() @ gram[:, kept] + ridge * weight[:, kept].float()
    if more is not None:
        wanted += more[:, kept]
    return torch.cholesky_solve(wanted.t(), solver).t()


def refit_masked(
    weight: torch.Tensor,
    start: torch.Tensor,
    keep: torch.Tensor,
    hessian: torch.Tensor,
    iterations: int,
    damping: float,
) -> torch.Tensor:
    """(out, in) fp32 weights, zero where keep is False, closer to the dense output than `start` (zero there too).

    Conjugate gradients on min tr((W - V) H (W - V)^T) over the kept entries of V, every row its own problem, all rows
    in one matrix product per iteration; the diagonal of H is the preconditioner (the finish of ALPS, Meng et al. 2024).
    The error never rises from one iteration to the next.
    """
    solid = damped(hessian.float(), damping)
    scale = solid.diagonal().sqrt()
    solid = solid.div_(scale).div_(scale[:, None])  # a unit diagonal preconditions
    dropped, tiny = ~keep, torch.finfo(torch.float32).tiny
    fitted = start.float() * scale
    residual = ((weight.float() * scale - fitted) @ solid).masked_fill_(dropped, 0)
    step = residual.clone()
    size = torch.linalg.vector_norm(residual, dim=1, keepdim=True).square_()
    for _ in range(iterations):
        image = (step @ solid).masked_fill_(dropped, 0)
        length = size / (step * image).sum(1, keepdim=True).clamp_(min=tiny)
        fitted.addcmul_(length, step)
        residual.addcmul_(length, image, value=-1)
        size, before = torch.linalg.vector_norm(residual, dim=1, keepdim=True).square_(), size
        step.mul_(size / before.clamp(min=tiny)).add_(residual)
    return fitted.div_(scale)


def elimination_order(
    weight: torch.Tensor, gram: torch.Tensor, num_units: int, num_removed: int, *, damping: float, rounds: int = 32
) -> torch.Tensor:
    """(num_removed,) int64 indices of units in the order they should go: the first n are the choice for any n.

    Units are equal blocks of consecutive inputs. The optimal-brain-surgeon saliency of unit Q given the units still
    there is tr(W_Q ([P]_QQ)^-1 W_Q^T) with P = (G[K, K])^-1 and W re-fitted: the output error its removal adds when
    everything else adapts. After each round the rest is re-fitted and scored again, by removing Q from P and W:
    W_K - W_Q P_QQ^-1 P_QK and P_KK - P_KQ P_QQ^-1 P_QK (the inverse of a principal submatrix), so that a round costs a
    product with Q's columns and no factorisation.
    """
    width = weight.shape[1] // num_units
    kept = torch.arange(num_units, device=weight.device)
    solver, _ = _solver(gram, unit_columns(kept, width), damping)
    present, inverse = weight.float(), torch.cholesky_inverse(solver)
    gone = [kept[:0]]
    for goes in spread(num_removed, [1] * min(rounds, max(num_removed, 1))):
        if goes == 0:
            continue
        order = _block_saliency(present, inverse, width).argsort(stable=True)
        gone.append(kept[order[:goes]])
        out, stay = order[:goes], order[goes:].sort().values
        present, inverse = _without(present, inverse, unit_columns(out, width), unit_columns(stay, width))
        kept = kept[stay]
    return torch.cat(gone)


def _without(
    weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Re-fitted weight and inverse Gram matrix of the inputs that are kept when the others are removed."""
    cross = inverse[gone][:, kept]
    share = torch.linalg.solve(inverse[gone[:, None], gone], cross)
    return weight[:, kept] - weight[:, gone] @ share, inverse[kept[:, None], kept] - cross.t() @ share


def unit_columns(units: torch.Tensor, width: int) -> torch.Tensor:
    """Input features of units that are blocks of `width` consecutive ones."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _block_saliency(weight: torch.Tensor, inverse: torch.Tensor, width: int) -> torch.Tensor:
    """tr(W_Q (P_QQ)^-1 W_Q^T) of consecutive blocks Q of `width` inputs."""
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal()
    count = weight.shape[1] // width
    index = torch.arange(count, device=weight.device)
    blocks = inverse.view(count, width, count, width)[index, :, index, :]
    columns = weight.view(-1, count, width).permute(1, 2, 0)
    return (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))


def _solver(gram: torch.Tensor, columns: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cholesky factor of the damped Gram matrix of some inputs, and what was added to its diagonal."""
    inside = gram[columns[:, None], columns].float()
    lower, used = cholesky(inside, damping)
    return lower, damped(inside, used).diagonal() - inside.diagonal()
