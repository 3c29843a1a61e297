"""One plain function per criterion: fp32 tensors in, fp32 scores of the same shape out, larger = more important.

W is (out, in); X the (tokens, in) inputs of the layer; g the gradient of the mean loss per token.
"""

from __future__ import annotations

import torch


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """|w|."""
    return weight.float().abs()


def wanda(weight: torch.Tensor, input_sq_sum: torch.Tensor) -> torch.Tensor:
    """|w| * ||x||_2 with the norm of each weight's input feature over all tokens (Sun et al. 2023). input_sq_sum broadcasts
    against the weight."""
    return weight.float().abs() * input_sq_sum.clamp(min=0).sqrt()


def ria(weight: torch.Tensor, input_sq_sum: torch.Tensor) -> torch.Tensor:
    """(|w| / sum of its row's |w| + |w| / sum of its column's |w|) * ||x||_2^(1/2) (relative importance and activations,
    Zhang et al. 2024). weight: the whole (out, in) matrix; input_sq_sum: (in,)."""
    size = weight.float().abs()
    tiny = torch.finfo(torch.float32).tiny
    relative = size / size.sum(1, keepdim=True).clamp(min=tiny) + size / size.sum(0).clamp(min=tiny)
    return relative * input_sq_sum.clamp(min=0).pow(0.25)


def gblm(
    weight: torch.Tensor, input_sq_sum: torch.Tensor, grad_sq_sum: torch.Tensor, alpha: float = 100
) -> torch.Tensor:
    """|w| * (||x||_2 + alpha * ||g||_2): Wanda with the norm of the weight's gradients over the samples (GBLM-Pruner, Das et
    al. 2023). input_sq_sum broadcasts against the weight; the gradients' scale is that of each sample's mean loss."""
    return weight.float().abs() * (input_sq_sum.clamp(min=0).sqrt() + alpha * grad_sq_sum.sqrt())


def taylor(weight: torch.Tensor, grad_sum: torch.Tensor) -> torch.Tensor:
    """|w * g|: first-order change of the loss when the weight goes (Molchanov et al. 2019)."""
    return (weight.float() * grad_sum).abs()


def fisher(weight: torch.Tensor, grad_sq_sum: torch.Tensor) -> torch.Tensor:
    """w^2 * sum g^2 / 2 over samples: second-order change under the empirical Fisher (Theis et al. 2018)."""
    return weight.float().square() * grad_sq_sum / 2


def second_order(gate_grads: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Loss change when a gate goes from 1 to 0: -g + F/2, in units of loss per token.

    gate_grads: (units, sequences) fp64, derivative of each sequence's summed loss. counts: (sequences,) tokens.
    The curvature F is the empirical Fisher over sequences.
    """
    return (-gate_grads.sum(1) + gate_grads.square().sum(1) / 2) / counts.sum()


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
    """By how much probe b's mean difference per token is larger than probe a's, at [a, b], and the standard error over the
    sequences that both saw (inf with one).

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
    """The standard normal deviate that is as rare as Student's t (Wallace 1959: within 5 % with one degree of freedom, 0.5 %
    with four). 0 where there is no degree of freedom."""
    far = (freedom * torch.log1p(t.square() / max(freedom, 1))).sqrt()
    return (8 * freedom + 1) / (8 * freedom + 3) * far * t.sign()


def column_energy(weight: torch.Tensor, input_sq_sum: torch.Tensor) -> torch.Tensor:
    """||W_:,j||^2 * sum x_j^2 of each input feature: energy it feeds into the layer's output. Returns (in,)."""
    return weight.float().square().sum(0) * input_sq_sum


def block_influence(cosine_sum: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """1 - mean cosine between a layer's input and output (ShortGPT, Men et al. 2024)."""
    return 1 - cosine_sum / num_tokens


def unit_sums(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Sum of consecutive blocks of `width` features: (units * width,) -> (units,)."""
    return scores.view(-1, width).sum(1)
