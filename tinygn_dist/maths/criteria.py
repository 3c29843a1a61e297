"""Criteria: one plain function each, fp32 tensors in, fp32 scores of the same shape out, larger = more important.

W is (out, in); X the (tokens, in) inputs of the layer; g the gradient of the mean loss per token; dy the (tokens, out)
gradient of the summed loss at the layer's output. `CRITERIA` is the table of those that score single weights: config
choices, help, checks and the statistics that are gathered all come from it. A new one is a function and a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """|w|."""
    return weight.float().abs()


def wanda(weight: torch.Tensor, input_sq_sum: torch.Tensor) -> torch.Tensor:
    """|w| * ||x||_2 with the norm of each weight's input feature over all tokens (Sun et al. 2023). input_sq_sum
    broadcasts against the weight."""
    return weight.float().abs() * input_sq_sum.clamp(min=0).sqrt()


def ria(weight: torch.Tensor, input_sq_sum: torch.Tensor) -> torch.Tensor:
    """(|w| / sum of its row's |w| + |w| / sum of its column's |w|) * ||x||_2^(1/2) (relative importance and
    activations, Zhang et al. 2024). weight: the whole (out, in) matrix; input_sq_sum: (in,)."""
    size = weight.float().abs()
    tiny = torch.finfo(torch.float32).tiny
    relative = size / size.sum(1, keepdim=True).clamp(min=tiny) + size / size.sum(0).clamp(min=tiny)
    return relative * input_sq_sum.clamp(min=0).pow(0.25)


def gblm(
    weight: torch.Tensor, input_sq_sum: torch.Tensor, grad_sq_sum: torch.Tensor, alpha: float = 100
) -> torch.Tensor:
    """|w| * (||x||_2 + alpha * ||g||_2): Wanda with the norm of the weight's gradients over the samples (GBLM-Pruner,
    Das et al. 2023). input_sq_sum broadcasts against the weight; the gradients' scale is that of each sample's mean
    loss."""
    return weight.float().abs() * (input_sq_sum.clamp(min=0).sqrt() + alpha * grad_sq_sum.sqrt())


def taylor(weight: torch.Tensor, grad_sum: torch.Tensor) -> torch.Tensor:
    """|w * g|: first-order change of the loss when the weight goes (Molchanov et al. 2019)."""
    return (weight.float() * grad_sum).abs()


def fisher(weight: torch.Tensor, grad_sq_sum: torch.Tensor) -> torch.Tensor:
    """w^2 * sum g^2 / 2 over samples: second-order change under the empirical Fisher (Theis et al. 2018)."""
    return weight.float().square() * grad_sq_sum / 2


def kfac(weight: torch.Tensor, input_sq_sum: torch.Tensor, output_grad_sq_sum: torch.Tensor) -> torch.Tensor:
    """w_oi^2 * sum x_i^2 * sum dy_o^2 / 2 over tokens: second-order change under the diagonal of the Kronecker-factored
    Fisher, up to one factor for the whole model (Martens & Grosse 2015; for pruning EigenDamage, Wang et al. 2019,
    and the LLM Surgeon, van der Ouderaa et al. 2024). Both sums broadcast against the weight; no gradient of a
    weight is needed."""
    return weight.float().square() * input_sq_sum.clamp(min=0) * output_grad_sq_sum / 2


def random(weight: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """uniform: numbers in [0, 1) by seed and global index, whatever the sharding."""
    return uniform


def second_order(gate_grads: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Loss change when a gate goes from 1 to 0: -g + F/2, in units of loss per token.

    gate_grads: (units, sequences) fp64, derivative of each sequence's summed loss. counts: (sequences,) tokens.
    The curvature F is the empirical Fisher over sequences.
    """
    return (-gate_grads.sum(1) + gate_grads.square().sum(1) / 2) / counts.sum()


def column_energy(weight: torch.Tensor, input_sq_sum: torch.Tensor) -> torch.Tensor:
    """||W_:,j||^2 * sum x_j^2 of each input feature: energy it feeds into the layer's output. Returns (in,)."""
    return weight.float().square().sum(0) * input_sq_sum


def block_influence(cosine_sum: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """1 - mean cosine between a layer's input and output (ShortGPT, Men et al. 2024)."""
    return 1 - cosine_sum / num_tokens


def unit_sums(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Sum of consecutive blocks of `width` features: (units * width,) -> (units,)."""
    return scores.view(-1, width).sum(1)


class Statistic(NamedTuple):
    """What a criterion may ask for. per: one number for each input, each output, or each weight."""

    per: Literal["input", "output", "weight"]
    needs_data: bool = True
    needs_backprop: bool = False


STATISTICS = {
    "uniform": Statistic("weight", needs_data=False),
    "input_sq_sum": Statistic("input"),
    "grad_sum": Statistic("weight", needs_backprop=True),
    "grad_sq_sum": Statistic("weight", needs_backprop=True),
    "output_grad_sq_sum": Statistic("output", needs_backprop=True),
}
"""by the name of the argument under which a formula takes it"""


@dataclass(frozen=True)
class Criterion:
    """A row of `CRITERIA`.

    formula: (weight, **needed statistics) -> scores; None where the layer solver chooses and updates at once, or
    where the scores are gathered while the model trains. needs: names in `STATISTICS`. whole: the formula sees whole
    matrices, not pieces of them. scope: where weights compete by default, as published. one_shot, in_schedule: where
    it may be asked for.
    """

    formula: Callable[..., torch.Tensor] | None
    needs: tuple[str, ...] = ()
    whole: bool = False
    scope: Literal["row", "layer"] = "layer"
    one_shot: bool = True
    in_schedule: bool = True

    @property
    def needs_data(self) -> bool:
        return self.formula is None or any(STATISTICS[name].needs_data for name in self.needs)

    @property
    def needs_backprop(self) -> bool:
        return any(STATISTICS[name].needs_backprop for name in self.needs)


SOLVER = "obs"
"""the criterion of the layer solver (maths/solve/obs.py), which updates what it keeps"""

CRITERIA = {
    "magnitude": Criterion(magnitude),
    "wanda": Criterion(wanda, ("input_sq_sum",), scope="row"),
    "ria": Criterion(ria, ("input_sq_sum",), whole=True, scope="row"),
    "gblm": Criterion(gblm, ("input_sq_sum", "grad_sq_sum"), scope="row"),
    "taylor": Criterion(taylor, ("grad_sum",)),
    "fisher": Criterion(fisher, ("grad_sq_sum",)),
    "kfac": Criterion(kfac, ("input_sq_sum", "output_grad_sq_sum")),
    SOLVER: Criterion(None),
    "random": Criterion(random, ("uniform",)),
}
