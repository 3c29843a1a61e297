"""Every rank holds the whole model: one process, or DDP. One rank is the degenerate case, not another code path."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.optimizer_state import Held
from tinygn_dist.maths.bit_zeros import keep_only_
from tinygn_dist.models.anatomy import Matrix


class Replicated(Backend):
    """Estimation runs on the bare model (each rank its own micro-batches, moments summed once); the DDP wrapper
    appears only when an optimizer is prepared."""

    wrappers = (DistributedDataParallel,)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if optimizer is None:
            return model.to(self.device)
        return self._accelerator.prepare(model, optimizer)

    def release(self, model: nn.Module, *prepared: Any) -> None:
        self._accelerator.free_memory(*prepared)

    def write(self, model: nn.Module, matrix: Matrix, piece: torch.Tensor) -> None:
        self.shard(model, matrix).weight.copy_(piece)

    def write_mask(self, model: nn.Module, matrix: Matrix, keep: torch.Tensor) -> None:
        keep_only_(self.shard(model, matrix).weight, keep)

    def no_sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self._accelerator.no_sync(model)

    def held(self, model: nn.Module, optimizer: Any, name: str) -> Held:
        parameter = self.unwrap(model).get_parameter(name)
        return Held(parameter, 0, 0, parameter.numel())

    def write_whole(self, model: nn.Module, name: str, whole: torch.Tensor) -> None:
        parameter = self.unwrap(model).get_parameter(name)
        parameter.data.copy_(whole.view(parameter.shape))
