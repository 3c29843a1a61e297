"""What `--goal params=0.8` means for one model: a share of all parameters, bytes or multiplications becomes the share
of its removable layers' parameters that has to go. `latency=0.8` stays what it is, a share of what `latency.py`
measures."""

from __future__ import annotations

from torch import nn

from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.maths.unit_kinds import UNIT_KINDS
from tinygn_dist.models.anatomy import Anatomy


def sparsity_of(options: PruneConfig, anatomy: Anatomy, skeleton: nn.Module, dense_params: int) -> float:
    """The sparsity that brings the whole model to `options.goal`; `options.sparsity` without a goal.

    dense_params: what a sparsity is a share of. skeleton: the model on the meta device. Raises UserError, before
    weights load, when what cannot be cut alone is more than the goal.
    """
    if options.goal is None:
        return options.sparsity
    measure, _, share = options.goal.partition("=")
    if measure in ("flops", "latency"):
        for kind, row in UNIT_KINDS.items():
            if row.uneven_cost and (anatomy.of_kind(kind) or options.pattern == kind):
                raise UserError(f"goal {measure}: {row.uneven_cost}; use params or bytes")
        if len(anatomy.stacks) > 1:
            raise UserError(
                f"goal {measure}: its stacks of layers read different numbers of positions; use params or bytes"
            )
    if measure == "latency" and not anatomy.starts_anywhere:
        raise UserError(
            f"goal latency: layers of {anatomy.model_class} cannot run by themselves; use params, bytes or flops"
        )
    if measure == "latency" and options.uneven:
        raise UserError(
            "goal latency: layers are timed alike, prune.uneven lets them differ; use params, bytes or flops"
        )
    if measure == "latency":
        return 1 - float(share)
    cost = _multiplied(anatomy, skeleton) if measure == "flops" else anatomy.total_params
    sparsity = (1 - float(share)) * cost / dense_params
    if sparsity >= 1:
        raise UserError(
            f"goal {options.goal}: {1 - dense_params / cost:.0%} of the model's {measure} lie outside its removable "
            f"layers (embeddings, head); ask for more than {measure}={1 - dense_params / cost:.2f}"
        )
    return sparsity


def _multiplied(anatomy: Anatomy, skeleton: nn.Module) -> int:
    """Weights that one token is multiplied with: those of the layers and of the head (tied or not), not embeddings."""
    head = skeleton.get_output_embeddings() if hasattr(skeleton, "get_output_embeddings") else None
    return sum(anatomy.layer_params) + (head.weight.numel() if head is not None else 0)
