"""The few collectives the backends are made of. Without a process group every one of them is the identity.

Nothing outside `backends/` calls these: a sum must say whether it adds disjoint pieces of weights or different batches
(see `base.Backend`). Counts and losses are made on the CPU as often as on the device, and a group of NCCL carries
device tensors only: they travel through a copy there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_(tensor: torch.Tensor, owner: int | None = None, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum in place over the group; with `owner`, only that rank's copy is complete afterwards."""
    if owner is None:
        return _in_place(tensor, group, lambda wired: dist.all_reduce(wired, group=group))
    return _in_place(tensor, group, lambda wired: dist.reduce(wired, dst=owner, group=group))


def broadcast_(tensor: torch.Tensor, owner: int) -> torch.Tensor:
    """Overwrite every rank's tensor with the owner's."""
    return _in_place(tensor, None, lambda wired: dist.broadcast(wired, src=owner))


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank. For small picklable facts only."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _in_place(
    tensor: torch.Tensor, group: dist.ProcessGroup | None, collective: Callable[[torch.Tensor], Any]
) -> torch.Tensor:
    if world_size() > 1:
        device = wire_device(tensor.device, dist.get_backend_config(group))
        wired = tensor.to(device)
        collective(wired)
        if wired is not tensor:
            tensor.copy_(wired)
    return tensor


def wire_device(device: torch.device, carried: str) -> torch.device:
    """Where a tensor has to be for a group; carried: `cuda:nccl` or `cpu:gloo,cuda:nccl`, as torch writes it."""
    kinds = [pair.partition(":")[0] for pair in carried.split(",")]
    return device if device.type in kinds else torch.device(kinds[0], torch.accelerator.current_device_index())
