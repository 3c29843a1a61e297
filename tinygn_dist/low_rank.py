"""Low-rank updates that keep zeros: a matrix W trains as W + M * (U D), with W fixed, M its mask, U D of small rank.

The product is masked before it is added (PERP, arXiv 2312.15230), so what is merged is as sparse as W, and the merged
matrix computes what the training computed. Unlike plain LoRA the masked product has no small rank: it is formed anew in
every forward, which costs about rank / tokens of the matrix product itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tinygn_dist.anatomy import Target
from tinygn_dist.errors import UserError

_NAME = "low_rank"
_SCALE = 2.0
"""of the product: the usual alpha = 2 * rank"""


class LowRank(nn.Module):
    """The update of one (out, in) matrix. up: (out, rank), zero at first; down: (rank, in)."""

    def __init__(self, shape: tuple[int, int], rank: int, keep: torch.Tensor | None, down: torch.Tensor) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(shape[0], rank, dtype=down.dtype, device=down.device))
        self.down = nn.Parameter(down)
        self._keep = keep  # no buffer: DDP would broadcast it in every forward

    def change(self) -> torch.Tensor:
        """(out, in), zero where the mask is."""
        product = (self.up @ self.down).mul(_SCALE)
        return product if self._keep is None else product.masked_fill(~self._keep, 0)


def check_targets(targets: Sequence[Target]) -> None:
    """UserError where there is nothing to update, or experts in one tensor, whose matrices no module of their own applies."""
    fused = next((target for target in targets if target.index is not None), None)
    if fused or not targets:
        what = f"the fused experts of {fused.module}" if fused else "a model without linear layers"
        raise UserError(
            f"recover.train lora with {what}; accepted: layers of linear modules; use all or norms-and-biases"
        )


def is_low_rank(name: str) -> bool:
    """Whether a parameter of this name belongs to an update."""
    return f".{_NAME}." in name


def add_low_rank(
    model: nn.Module, targets: Sequence[Target], keep: Mapping[str, torch.Tensor], rank: int, seed: int
) -> None:
    """Give every target's module an update that its forward applies. keep: masks by target, shaped as the weights are
    stored; targets without one are dense. Every rank holds all weights whole and makes the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    for target in targets:
        module = model.get_submodule(target.module)
        weight, mask = module.weight, keep.get(target.name)
        down = torch.randn(rank, target.shape[1], generator=generator) / target.shape[1] ** 0.5
        update = LowRank(
            target.shape,
            min(rank, *target.shape),
            None if mask is None else target.matrix(mask),
            down[: min(rank, *target.shape)].to(weight.device, weight.dtype),
        )
        module.add_module(_NAME, update)
        module.forward = _Forward(module, target)


class _Forward:
    """A linear module's forward with its update: one matrix product, of the sum."""

    def __init__(self, module: nn.Module, target: Target) -> None:
        self._module, self._target = module, target

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        module = self._module
        weight = self._target.matrix(module.weight) + module.get_submodule(_NAME).change().to(module.weight.dtype)
        return F.linear(hidden, weight, module.bias)


def merge_low_rank(model: nn.Module, targets: Sequence[Target]) -> None:
    """Add every update to its weight and take it away; the modules are as before otherwise."""
    for target in targets:
        module = model.get_submodule(target.module)
        with torch.no_grad():
            target.matrix(module.weight.data).add_(module.get_submodule(_NAME).change())
        del module.forward
        delattr(module, _NAME)
