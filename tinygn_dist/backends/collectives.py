"""The few collectives the backends are made of. Without a process group every one of them is the identity.

Nothing outside `backends/` calls these: a sum must say whether it adds disjoint pieces of weights or different
batches (see `base.Backend`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_(tensor: torch.Tensor, owner: int | None = None, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum in place over the group; with `owner`, only that rank's copy is complete afterwards."""
    if world_size() > 1:
        if owner is None:
            dist.all_reduce(tensor, group=group)
        else:
            dist.reduce(tensor, dst=owner, group=group)
    return tensor


def max_(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Elementwise maximum in place over the group."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def broadcast_(tensor: torch.Tensor, owner: int) -> torch.Tensor:
    """Overwrite every rank's tensor with the owner's."""
    if world_size() > 1:
        dist.broadcast(tensor, src=owner)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank. For small picklable facts only."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
