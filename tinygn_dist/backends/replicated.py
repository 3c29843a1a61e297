"""Every rank holds the whole model: one process, or DDP. One rank is the degenerate case, not another code path."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tinygn_dist.anatomy import Target
from tinygn_dist.backends import collectives
from tinygn_dist.backends.base import Backend, Item, Job, Look, Shard, Solve


class Replicated(Backend):
    """Estimation runs on the bare model (each rank its own micro-batches, moments summed once); the DDP wrapper
    appears only when an optimizer is prepared."""

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if optimizer is None:
            return model.to(self.device)
        return self._accelerator.prepare(model, optimizer)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, DistributedDataParallel) else model

    def release(self, *prepared: Any) -> None:
        self._accelerator.free_memory(*prepared)

    def share(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        return [(item, True) for item in items[self.rank :: self.num_ranks]]

    def shard(self, model: nn.Module, target: Target) -> Shard:
        weight = self.unwrap(model).get_parameter(target.parameter)
        return Shard(target.within(weight.data), 0, None if weight.grad is None else target.within(weight.grad))

    def full_state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self.unwrap(model).state_dict().items()}

    def sum_over_shards(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor  # every rank already holds every weight

    def max_over_shards(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def sum_over_data(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            collectives.sum_(tensor)

    def sum_for_jobs(self, jobs: Sequence[Job]) -> None:
        for job, owner in zip(jobs, self.deal([job.cost for job in jobs]), strict=True):
            for index, moment in enumerate(job.moments):
                collectives.sum_(moment, owner=owner)
                if owner != self.rank:
                    job.moments[index] = moment.new_empty(0)

    def map_targets(self, model: nn.Module, jobs: Sequence[Job], solve: Solve) -> dict[str, torch.Tensor]:
        owners = self.deal([job.cost for job in jobs])
        masks, solved = {}, {}
        for index, (job, owner) in enumerate(zip(jobs, owners, strict=True)):
            if owner == self.rank:
                solved[index] = solve(job, self._whole_weights(model, job))
        for index, (job, owner) in enumerate(zip(jobs, owners, strict=True)):
            for position, target in enumerate(job.targets):
                live = self.shard(model, target).weight
                weight, keep = (live.new_empty(target.shape), torch.empty(target.shape, dtype=torch.bool))
                if owner == self.rank:
                    weight, keep = solved[index][position]
                weight = weight.to(self.device, live.dtype).contiguous()
                keep = keep.to(self.device).contiguous()
                target.matrix(live).copy_(collectives.broadcast_(weight, owner))
                masks[target.name] = target.matrix(collectives.broadcast_(keep, owner))
        return masks

    def look_at_targets(self, model: nn.Module, jobs: Sequence[Job], look: Look) -> None:
        for job, owner in zip(jobs, self.deal([job.cost for job in jobs]), strict=True):
            if owner == self.rank:
                look(job, self._whole_weights(model, job))

    def _whole_weights(self, model: nn.Module, job: Job) -> list[torch.Tensor]:
        return [target.matrix(self.shard(model, target).weight) for target in job.targets]

    def write_mask(self, model: nn.Module, target: Target, keep: torch.Tensor) -> None:
        weight = self.shard(model, target).weight
        weight.masked_fill_(~keep, 0)  # not a product: -1.0 * False would leave -0.0

    def no_sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self._accelerator.no_sync(model)

    def inner_optimizer(self, optimizer: Any) -> torch.optim.Optimizer:
        return getattr(optimizer, "optimizer", optimizer)
