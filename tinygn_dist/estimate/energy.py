"""How much the loss listens to each output of a linear layer: gradient energy, per token and per output feature.

To second order (empirical Fisher) a change dW of a layer costs 1/(2N) sum_t (dy_t . dW x_t)^2, with dy_t the gradient
of the summed loss at the layer's output. Weighting the Hessian by s_t = mean_o dy_to^2 and the rows by their share of
the energy keeps that cost's scale, so that saliencies of different layers compare in units of loss (GuidedQuant,
arXiv 2505.07004, uses the same weights for quantisation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tinygn_dist.anatomy import Target
from tinygn_dist.estimate.backprop import gradients_of
from tinygn_dist.estimate.experts import ExpertGradients
from tinygn_dist.estimate.hooks import Observer, attached
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.moments import Moments
from tinygn_dist.objective import Batch, real_tokens


@dataclass
class LossMoments:
    """This rank's sums, not yet reduced, by target name.

    gram: (in, in) sum_t s_t x_t x_t^T. rows: (out,) sum_t dy_to^2 |x_t|^2. num_tokens: (1,) fp64 tokens of the loss.
    """

    gram: Moments = field(default_factory=Moments)
    rows: Moments = field(default_factory=Moments)
    num_tokens: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))


def loss_moments(setting: Setting, targets: Sequence[Target]) -> LossMoments:
    """Sums over this rank's batches by one backward pass per micro-batch, without any weight gradient."""
    found = LossMoments()
    for target in targets:
        out, num_inputs = target.shape
        found.gram.reserve(target.name, (num_inputs, num_inputs), setting.backend.device)
        found.rows.reserve(target.name, (out,), setting.backend.device)
    inputs: dict[str, torch.Tensor] = {}
    mask: list[torch.Tensor | None] = [None]

    def observer(name: str) -> Observer:
        def seen(hidden: torch.Tensor, output: Any) -> None:
            inputs[name] = hidden.detach()
            output.register_hook(lambda grad: _add(found, name, inputs.pop(name), grad, mask[0]))

        return Observer(seen, output=True)

    def fused(module: str) -> ExpertGradients:
        def seen(leaf: str, expert: int, x: torch.Tensor, dy: torch.Tensor, tokens: torch.Tensor) -> None:
            name = f"{module}.{leaf}[{expert}]"
            if name in found.gram:
                _add(found, name, x, dy, None if mask[0] is None else mask[0][tokens])

        return ExpertGradients(seen)

    mine = setting.backend.share(setting.batches)
    hooks = [
        (setting.bare.get_submodule(module), observer(target.name) if target.index is None else fused(module))
        for module, target in {target.module: target for target in targets}.items()
    ]
    hooks.append((setting.bare.get_input_embeddings(), _StartOfGraph()))
    with gradients_of(setting.bare, ()), attached(hooks), setting.progress.bar("gradient energy", len(mine)) as advance:
        for batch, real in mine:
            batch = setting.on_device(batch)
            mask[0] = real_tokens(batch) if real else torch.zeros(batch_tokens(batch), dtype=torch.bool)
            losses = setting.objective(setting.model, batch)
            losses.total.sum().backward()
            if real:
                found.num_tokens += float(losses.count.sum())
            advance()
    return found


class _StartOfGraph(Observer):
    """Lets gradients flow from the embeddings' output on, so that no weight needs one."""

    def __init__(self) -> None:
        super().__init__(lambda *_: None)

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()


def batch_tokens(batch: Batch) -> int:
    return next(iter(batch.values())).shape[:2].numel()


def _add(found: LossMoments, name: str, hidden: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor | None) -> None:
    x, dy = hidden.flatten(0, -2).float(), grad.flatten(0, -2).float()
    if mask is not None:
        x, dy = x[mask], dy[mask]
    squared = dy.square()
    found.gram.add(name, (x * squared.mean(1, keepdim=True)).t() @ x)
    found.rows.add(name, squared.t() @ x.square().sum(1))
