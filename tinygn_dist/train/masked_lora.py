"""Low-rank updates that keep zeros: a matrix W trains as W + M * (U D), with W fixed, M its mask, U D of small rank.

The product is masked before it is added (PERP, arXiv 2312.15230), so what is merged is as sparse as W, and the merged
matrix computes what the training computed. M is where W is not zero: nobody has to keep a second copy of it, and where
ranks hold pieces of W it comes whole with W in every forward. Unlike plain LoRA the masked product has no small rank:
it is formed anew in every forward and backward, which costs about rank / tokens of the matrix product itself, and is
never kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.errors import UserError
from tinygn_dist.models.anatomy import Matrix

_NAME = "low_rank"
_SCALE = 2.0
"""of the product: the usual alpha = 2 * rank"""


def check_targets(matrices: Sequence[Matrix]) -> None:
    """UserError where there is nothing to update, or experts in one tensor, whose matrices no module of their own
    applies."""
    fused = next((matrix for matrix in matrices if matrix.index is not None), None)
    if fused or not matrices:
        what = f"the fused experts of {fused.module}" if fused else "a model without linear layers"
        raise UserError(
            f"recover.train lora with {what}; accepted: layers of linear modules; use all or norms-and-biases"
        )


def is_low_rank(name: str) -> bool:
    """Whether a parameter of this name belongs to an update."""
    return f".{_NAME}." in name


class LowRankUpdates:
    """Updates of some matrices of a placed model: from here on their modules' forwards apply them, until `take`."""

    def __init__(
        self,
        model: nn.Module,
        matrices: Sequence[Matrix],
        keep: Mapping[str, torch.Tensor],
        rank: int,
        seed: int,
        backend: Backend,
    ) -> None:
        """keep: masks by matrix, shaped like this rank's shards, applied already; matrices without one are dense. rank:
        that of a smaller matrix is its own. Every rank makes the same numbers."""
        self.matrices, self._keep, self._backend = tuple(matrices), keep, backend
        self._values: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        bare, generator, added = backend.unwrap(model), torch.Generator().manual_seed(seed), []
        for matrix in self.matrices:
            module = bare.get_submodule(matrix.module)
            down = torch.randn(rank, matrix.shape[1], generator=generator) / matrix.shape[1] ** 0.5
            down = down[: min(rank, *matrix.shape)].to(backend.device, module.weight.dtype)
            added.append(_LowRank(module, matrix, down, masked=matrix.name in keep))
            module.add_module(_NAME, added[-1])
            module.forward = added[-1].__call__
        backend.place_added(model, added)

    def take(self, model: nn.Module, optimizer: Any) -> None:
        """Take the updates out of a model in training, as whole fp32 tensors on every rank. Collectives."""
        bare = self._backend.unwrap(model)
        for matrix in self.matrices:
            module = bare.get_submodule(matrix.module)
            up, down = (
                self._backend.whole_training(model, optimizer, f"{matrix.module}.{_NAME}.{leaf}")["weight"].float()
                for leaf in ("up", "down")
            )
            self._values[matrix.name] = up.view(matrix.shape[0], -1), down.view(-1, matrix.shape[1])
            del module.forward
            delattr(module, _NAME)
        self._backend.added_are_gone(model)

    def merge(self, model: nn.Module) -> None:
        """Add what was taken to the weights of the placed model, in fp32, and forget it."""
        for matrix in self.matrices:
            up, down = (part.to(self._backend.device) for part in self._values.pop(matrix.name))
            stored = matrix.oriented((up @ down).mul_(_SCALE)).contiguous()
            weight = self._backend.shard(model, matrix).weight
            change = self._backend.shard_of(model, matrix, stored).reshape(weight.shape)
            if matrix.name in self._keep:
                change = change.masked_fill(~self._keep[matrix.name], 0)
            self._backend.write(model, matrix, (weight.float() + change).to(weight.dtype))


class _LowRank(nn.Module):
    """A module's forward with the update of its (out, in) matrix. up: (out, rank), zero at first; down: (rank, in)."""

    def __init__(self, module: nn.Module, matrix: Matrix, down: torch.Tensor, masked: bool) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(matrix.shape[0], len(down), dtype=down.dtype, device=down.device))
        self.down = nn.Parameter(down)
        self._of = (module, matrix, masked)  # in a tuple the module is not a child of its own child

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        module, matrix, masked = self._of
        return _Apply.apply(hidden, module.weight, module.bias, self.up, self.down, matrix, masked)


class _Apply(torch.autograd.Function):
    """hidden (..., in) times the updated matrix, plus a bias. The updated matrix is made again for the backward: kept
    by every layer it would be a second model, and whole on every rank where the weights are sharded. `weight` is the
    module's own parameter, which sharded backends bring back for the backward, and gets no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, up, down, matrix, masked) -> torch.Tensor:  # noqa: ANN001
        ctx.save_for_backward(hidden, weight, up, down)
        ctx.how = (matrix, masked)
        return F.linear(
            hidden, _updated(weight, up, down, matrix, masked), bias
        )  # autocast, where it is on, casts here

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, up, down = ctx.saved_tensors
        matrix, masked = ctx.how
        rows = grad.reshape(-1, grad.shape[-1])
        of_hidden = rows @ _updated(weight, up, down, matrix, masked).to(grad.dtype)
        of_change = (rows.t() @ hidden.reshape(-1, hidden.shape[-1]).to(grad.dtype)).to(up.dtype).mul_(_SCALE)
        if masked:
            of_change.mul_(matrix.oriented(weight) != 0)
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        of_up, of_down = of_change @ down.t(), up.t() @ of_change
        return of_hidden.view_as(hidden).to(hidden.dtype), None, of_bias, of_up, of_down, None, None


def _updated(weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, matrix: Matrix, masked: bool) -> torch.Tensor:
    """(out, in)"""
    matrix = matrix.oriented(weight)
    with torch.autocast(weight.device.type, enabled=False):
        change = (up @ down).mul_(_SCALE)
    if masked:
        change.mul_(matrix != 0)
    return change.to(matrix.dtype).add_(matrix)
