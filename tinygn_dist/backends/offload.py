"""One process and a model that its device has no room for: weights wait in CPU memory or on disk (offload_hooks.py).

Pieces of weights, scores and masks lie where the weights wait; whole weights that are worked on, and statistics of
activations, on the device.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.gradients import GradientSums, hooked
from tinygn_dist.backends.offload_hooks import is_offloaded, offload, offloaded_parameters
from tinygn_dist.backends.optimizer_state import Held
from tinygn_dist.backends.pieces import (
    Extras,
    Job,
    Look,
    Origin,
    Shard,
    Solve,
    tensor_named,
    tensors_of,
    without_storage,
)
from tinygn_dist.config import DistributedConfig
from tinygn_dist.errors import UserError
from tinygn_dist.maths.bit_zeros import keep_only_
from tinygn_dist.models.anatomy import Matrix


class Offloaded(Backend):
    """Every forward fetches one block of the model after the other, in estimation and training alike."""

    weights_wait = True
    _training = False
    """whether gradients go to the optimizer"""

    def __init__(self, accelerator: Accelerator, options: DistributedConfig) -> None:
        super().__init__(accelerator)
        on_disk = options.offload == "disk"
        self._folder = Path(options.offload_dir or tempfile.gettempdir()).expanduser() if on_disk else None
        self._device_bytes = options.device_gib * 2**30
        self._handles: list[Any] = []
        self._steps: dict[nn.Parameter, nn.Parameter] = {}  # what the optimizer steps, of every parameter it was given

    # -- where the model is ------------------------------------------------------------------------------------------
    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if optimizer is None:
            if not is_offloaded(model):
                self._offload(model)
            return model
        offloaded = offloaded_parameters(model)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._steps[parameter] = offloaded[parameter].value
                if not offloaded[parameter].stays:
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._collect))
            group["params"] = [self._steps[parameter].requires_grad_() for parameter in group["params"]]
        self._training = True
        return model, self._accelerator.prepare_optimizer(optimizer)

    def _offload(self, model: nn.Module) -> None:
        try:
            offload(model, self.device, self._folder, self._device_bytes)
        except OSError as error:
            needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
            raise UserError(
                f"distributed.offload_dir {self._folder}: {error.strerror}; the weights take {needed:,} bytes, name a "
                "folder with room for them"
            ) from None

    def _collect(self, parameter: nn.Parameter) -> None:
        """Gradients leave the device as soon as they are there."""
        if self._training:
            value = self._steps[parameter]
            grad, parameter.grad = parameter.grad.to(value.device), None
            value.grad = grad if value.grad is None else value.grad.add_(grad)

    def release(self, model: nn.Module, *prepared: Any) -> None:
        self._training = False
        for handle in self._handles:
            handle.remove()
        for parameter in offloaded_parameters(model).values():
            parameter.value.grad = None
        self._handles, self._steps = [], {}
        self._accelerator.free_memory(*prepared)

    def place(self, origin: Origin) -> nn.Module:
        model, run = origin.take_empty()
        without_storage(model, torch.device("cpu"))
        with self.together("making room for the weights"):
            self.prepare(model)
        with self.together("reading the weights"), torch.no_grad():
            for name, held in self._held(model).items():
                held.copy_(run(name, 0, held.numel()).view(held.shape))
        return model

    def _cast(self, model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
        offloaded = offloaded_parameters(model)
        for name, parameter in model.named_parameters():
            offloaded[parameter].cast(dtypes[name])
        for name, buffer in model.named_buffers():
            buffer.data = buffer.data.to(dtypes[name])

    def _held(self, model: nn.Module) -> dict[str, torch.Tensor]:
        offloaded = offloaded_parameters(model)
        return {n: offloaded[t].value.data if t in offloaded else t for n, t in tensors_of(model).items()}

    # -- pieces of weights -------------------------------------------------------------------------------------------
    def _value(self, model: nn.Module, name: str) -> nn.Parameter:
        return offloaded_parameters(model)[model.get_parameter(name)].value

    def shard(self, model: nn.Module, matrix: Matrix) -> Shard:
        return Shard(matrix.within(self._value(model, matrix.parameter).data), 0)

    def gather(self, model: nn.Module, matrix: Matrix, piece: torch.Tensor) -> torch.Tensor:
        return piece.to(self.device)

    def shard_of(self, model: nn.Module, matrix: Matrix, whole: torch.Tensor) -> torch.Tensor:
        return whole.to(self._value(model, matrix.parameter).device)

    def whole(self, model: nn.Module, name: str) -> torch.Tensor:
        tensor = tensor_named(model, name)
        return self._value(model, name).data if isinstance(tensor, nn.Parameter) else tensor

    def pieces(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().reshape(-1) for name, tensor in self._held(model).items()}

    @contextlib.contextmanager
    def gradient_sums(
        self, model: nn.Module, matrices: Sequence[Matrix], function: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[GradientSums]:
        sums = self._empty_sums(model, matrices, function)
        places = [
            (model.get_parameter(t.parameter), t, lambda whole, t=t: self.shard_of(model, t, whole)) for t in matrices
        ]
        with hooked(sums, places):
            yield sums

    # -- writing -----------------------------------------------------------------------------------------------------
    def write(self, model: nn.Module, matrix: Matrix, piece: torch.Tensor) -> None:
        self.shard(model, matrix).weight.copy_(piece)

    def write_mask(self, model: nn.Module, matrix: Matrix, keep: torch.Tensor) -> None:
        keep_only_(self.shard(model, matrix).weight, keep)

    def map_matrices(self, model: nn.Module, jobs: Sequence[Job], solve: Solve) -> dict[str, Extras]:
        """One job after the other: no more weights are on the device than one job has."""
        extras = {}
        for job in jobs:
            for matrix, result in zip(job.matrices, solve(job, self._matrices(model, job)), strict=True):
                self.write(model, matrix, self.shard_of(model, matrix, matrix.oriented(result.weight)))
                extras[matrix.name] = {
                    name: self.shard_of(model, matrix, matrix.oriented(value).contiguous())
                    if tuple(value.shape) == matrix.shape
                    else value
                    for name, value in result.extras.items()
                }
        return extras

    def look_at_targets(self, model: nn.Module, jobs: Sequence[Job], look: Look) -> None:
        for job in jobs:
            look(job, self._matrices(model, job))

    def _matrices(self, model: nn.Module, job: Job) -> list[torch.Tensor]:
        return [t.oriented(self.gather(model, t, self.shard(model, t).weight)) for t in job.matrices]

    # -- training ----------------------------------------------------------------------------------------------------
    def no_sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        super().clip_grad_norm([self._steps[p] for p in parameters if p in self._steps], max_norm)

    @contextlib.contextmanager
    def pausing(self, model: nn.Module) -> Iterator[None]:
        self._training = False
        yield
        self._training = True

    def held(self, model: nn.Module, optimizer: Any, name: str) -> Held:
        value = self._value(model, name)
        return Held(value, 0, 0, value.numel())

    def write_whole(self, model: nn.Module, name: str, whole: torch.Tensor) -> None:
        value = self._value(model, name)
        value.data.copy_(whole.view(value.shape))
