"""How much the loss listens to each output of a linear layer: gradient energy, per token and per output feature.

To second order (empirical Fisher) a change dW of a layer costs 1/(2N) sum_t (dy_t . dW x_t)^2, with dy_t the gradient
of the summed loss at the layer's output. The Hessian of that, weighted per token by s_t = mean_o dy_to^2, is right for
the loss at this point; the plain Hessian of the layer's output error stays right further away. The solver is given the
sum of both, each relative to its mean (see `token_weights`), and the rows' energy puts saliencies of different layers
in units of loss (GuidedQuant, arXiv 2505.07004, uses the same energies for quantisation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from tinygn_dist.anatomy import Target
from tinygn_dist.estimate.activations import InputMoments, complete, input_moments
from tinygn_dist.estimate.backprop import gradients_of
from tinygn_dist.estimate.experts import ExpertGradients
from tinygn_dist.estimate.hooks import Observer, attached
from tinygn_dist.estimate.setting import Setting, batch_size
from tinygn_dist.moments import Moments
from tinygn_dist.objective import Batch, real_tokens

ENERGY_WEIGHT = 0.25
"""What the energy adds to a token's weight, on average. Measured on SmolLM2-135M: 0 and 1 are both worse at 70 % and 2:4."""


@dataclass
class LossMoments:
    """This rank's sums, not yet reduced.

    inputs: (in, in) sum_t w_t x_t x_t^T by source, w_t from `token_weights`. rows: (out,) sum_t dy_to^2 |x_t|^2 by target
    name, over the sequences that were propagated back.
    """

    inputs: InputMoments = field(default_factory=InputMoments)
    rows: Moments = field(default_factory=Moments)


def token_weights(energy: torch.Tensor) -> torch.Tensor:
    """(tokens,) 1 + ENERGY_WEIGHT s_t / mean(s) from the gradient energies s_t of one micro-batch; 1 where no gradient
    arrives. Rounded (see `coarse`)."""
    mean = energy.mean()
    return coarse(1 + ENERGY_WEIGHT * energy / mean) if mean > 0 else torch.ones_like(energy)


def coarse(values: torch.Tensor) -> torch.Tensor:
    """fp32 values rounded to eight bits. The last bits of gradients depend on the backend (autograd adds in another order
    under DeepSpeed's hooks); weights do not need them, and without them the masks are the same."""
    return values.bfloat16().float()


def loss_moments(setting: Setting, targets: Sequence[Target], num_sequences: int) -> LossMoments:
    """Sums over this rank's batches: one backward pass for each of the first micro-batches, up to `num_sequences`
    sequences, without any weight gradient; a forward pass for each of the others, whose tokens all weigh the same."""
    sizes, num = [batch_size(batch) for batch in setting.batches], 0
    while num < len(sizes) and sum(sizes[:num]) < num_sequences:
        num += 1
    found = _Gathering(targets, setting).run(setting.batches[:num])
    if num < len(sizes):
        found.inputs.merge(input_moments(replace(setting, batches=setting.batches[num:]), targets, full=True))
    return found


class _Gathering:
    """Hooks that keep what each target read until the gradients of all targets that read it have arrived."""

    def __init__(self, targets: Sequence[Target], setting: Setting) -> None:
        self.setting, self.targets, self.found = setting, targets, LossMoments()
        self.names = {target.name for target in targets}
        for target in targets:
            self.found.rows.reserve(target.name, (target.shape[0],), setting.backend.device)
        self.read: dict[str, _Read] = {}
        self.mask: torch.Tensor | None = None
        self.counts = True

    def run(self, batches: Sequence[Batch]) -> LossMoments:
        setting = self.setting
        mine = setting.backend.share(batches)
        hooks = [
            (
                setting.bare.get_submodule(module),
                self._linear(target.name) if target.index is None else self._fused(module),
            )
            for module, target in {target.module: target for target in self.targets}.items()
        ]
        hooks.append((setting.bare.get_input_embeddings(), _StartOfGraph()))
        with (
            gradients_of(setting.bare, ()),
            attached(hooks),
            setting.progress.bar("gradient energy", len(mine)) as step,
        ):
            for batch, self.counts in mine:
                batch = setting.on_device(batch)
                self.mask = real_tokens(batch)
                setting.objective(setting.model, batch).total.sum().backward()
                for source in list(self.read):  # of targets that no gradient reached
                    self._finish(source)
                step()
        complete(self.found.inputs, setting)
        return self.found

    def _linear(self, name: str) -> Observer:
        def seen(hidden: torch.Tensor, output: Any) -> None:
            source = next((s for s, read in self.read.items() if _same(read.hidden, hidden)), name)
            read = self.read.setdefault(source, _Read(hidden, _rows(hidden, self.mask)))
            read.waiting += 1
            output.register_hook(lambda grad: self._arrived(source, name, _rows(grad, self.mask)))

        return Observer(seen, output=True)

    def _fused(self, module: str) -> ExpertGradients:
        def seen(leaf: str, expert: int, x: torch.Tensor, dy: torch.Tensor, tokens: torch.Tensor) -> None:
            name = f"{module}.{leaf}[{expert}]"
            if name in self.names:
                mask = None if self.mask is None else self.mask[tokens]
                self.read[name] = _Read(x, _rows(x, mask), waiting=1)
                self._arrived(name, name, _rows(dy, mask))

        return ExpertGradients(seen)

    def _arrived(self, source: str, name: str, grad: torch.Tensor) -> None:
        read, squared = self.read[source], grad.square()
        read.energy += squared.mean(1)
        read.waiting -= 1
        if self.counts:
            self.found.inputs.source_of.setdefault(name, source)
            self.found.rows.add(name, squared.t() @ read.squared_norm)
        if read.waiting == 0:
            self._finish(source)

    def _finish(self, source: str) -> None:
        read = self.read.pop(source)
        if self.counts:
            weighted = read.rows * token_weights(read.energy)[:, None]
            self.found.inputs.moments.add(source, weighted.t() @ read.rows)


@dataclass
class _Read:
    """What a group of targets read in one micro-batch. hidden: the tensor itself, to know it again. rows: (tokens, in) its
    real tokens. waiting: gradients yet to arrive. energy: (tokens,) their mean squares, summed over the targets."""

    hidden: torch.Tensor
    rows: torch.Tensor
    waiting: int = 0

    def __post_init__(self) -> None:
        self.squared_norm = self.rows.square().sum(1)
        self.energy = torch.zeros_like(self.squared_norm)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two live tensors are one in memory: DeepSpeed hands each module an alias of its own."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _rows(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    rows = hidden.detach().flatten(0, -2).float()
    return rows if mask is None else rows[mask]


class _StartOfGraph(Observer):
    """Lets gradients flow from the embeddings' output on, so that no weight needs one."""

    def __init__(self) -> None:
        super().__init__(lambda *_: None)

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()
