"""How much the loss listens to each output of a linear layer: gradient energy, per token and per output feature.

To second order (empirical Fisher) a change dW of a layer costs 1/(2N) sum_t (dy_t . dW x_t)^2, with dy_t the gradient
of the summed loss at the layer's output. The solver works with the Hessian of that, each token weighted by
s_t = mean_o dy_to^2, and the rows' energy puts saliencies of different layers in units of loss (GuidedQuant, arXiv
2505.07004, uses the same energies for quantisation). Every weight has a Hessian of its own, also where several read one
input: the loss listens to queries, keys and values at different tokens. `estimate/output_probes.py` measures the energy
of a whole layer by forward passes alone.
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
from tinygn_dist.moments import Moments, gram
from tinygn_dist.objective import real_tokens


@dataclass
class LossMoments:
    """This rank's sums by target name, not yet reduced.

    grams: (in, in) sum_t w_t x_t x_t^T, w_t from `token_weights`. rows: (out,) sum_t dy_to^2 |x_t|^2.
    """

    grams: Moments = field(default_factory=Moments)
    rows: Moments = field(default_factory=Moments)


def token_weights(energy: torch.Tensor, plain: float) -> torch.Tensor:
    """(tokens,) plain + s_t / mean(s) from the gradient energies s_t of one micro-batch; 1 where no gradient arrives.
    Rounded (see `coarse`)."""
    mean = energy.mean()
    return coarse(plain + energy / mean) if mean > 0 else torch.ones_like(energy)


def coarse(values: torch.Tensor) -> torch.Tensor:
    """fp32 values rounded to eight bits. The last bits of gradients depend on the backend (autograd adds in another order
    under DeepSpeed's hooks); weights do not need them, and without them the masks are the same."""
    return values.bfloat16().float()


def loss_moments(setting: Setting, targets: Sequence[Target], plain: float) -> LossMoments:
    """Sums over this rank's batches by one backward pass per micro-batch, without any weight gradient. plain: how much
    every token weighs beside its energy, whose mean is 1."""
    found, inputs = LossMoments(), {}
    for target in targets:
        out, num_inputs = target.shape
        found.grams.reserve(target.name, (num_inputs, num_inputs), setting.backend.device)
        found.rows.reserve(target.name, (out,), setting.backend.device)
    mask: torch.Tensor | None = None
    counts = True

    def linear(name: str) -> Observer:
        def seen(hidden: torch.Tensor, output: Any) -> None:
            inputs[name] = hidden.detach()
            output.register_hook(lambda grad: arrived(name, inputs.pop(name), grad, mask))

        return Observer(seen, output=True)

    def fused(module: str) -> ExpertGradients:
        def seen(leaf: str, expert: int, x: torch.Tensor, dy: torch.Tensor, tokens: torch.Tensor) -> None:
            name = f"{module}.{leaf}[{expert}]"
            if name in found.grams:
                arrived(name, x, dy, None if mask is None else mask[tokens])

        return ExpertGradients(seen)

    def arrived(name: str, hidden: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor | None) -> None:
        if not counts:
            return
        rows, squared = _rows(hidden, mask), _rows(grad, mask).square()
        found.grams.add(name, gram(rows, token_weights(squared.mean(1), plain)))
        found.rows.add(name, squared.t() @ rows.square().sum(1))

    hooks = [
        (setting.bare.get_submodule(module), linear(target.name) if target.index is None else fused(module))
        for module, target in {target.module: target for target in targets}.items()
    ]
    hooks.append((setting.bare.get_input_embeddings(), _StartOfGraph()))
    mine = setting.backend.share(setting.batches)
    with gradients_of(setting.bare, ()), attached(hooks), setting.progress.bar("gradient energy", len(mine)) as step:
        for batch, real in mine:
            counts = real
            batch = setting.on_device(batch)
            mask = real_tokens(batch)
            setting.objective(setting.model, batch).total.sum().backward()
            inputs.clear()  # of targets that no gradient reached
            step()
    return found


def _rows(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    rows = hidden.detach().flatten(0, -2).float()
    return rows if mask is None else rows[mask]


class _StartOfGraph(Observer):
    """Lets gradients flow from the embeddings' output on, so that no weight needs one."""

    def __init__(self) -> None:
        super().__init__(lambda *_: None)

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()
