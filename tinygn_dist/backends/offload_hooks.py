"""Weights that wait in CPU memory or in a file while no module needs them.

Accelerate's AlignDevicesHook swaps Parameter objects at every forward: gradient hooks, `requires_grad` and optimizers
lose them, and edits of weights on disk are lost. Here a Parameter stays the same object; a hook on each block of the
model fills its storage before the block runs and empties it afterwards. Autograd saves views of that storage, so the
hook fills it again when the backward pass comes to the block, as FSDP does.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.utils._pytree import tree_leaves

_OFFLOADED = "_tinygn_offloaded"
"""where a model keeps them, past nn.Module's registration, so that they go together"""


class OffloadedParameter:
    """One parameter. value: all of it where it waits, the copy that counts and that an optimizer steps; the parameter
    itself when it `stays` on the device."""

    def __init__(self, parameter: nn.Parameter, device: torch.device, folder: Path | None, stays: bool) -> None:
        self._live, self._device, self._folder, self.stays = parameter, device, folder, stays
        self._uses, self._in_backward = 0, False
        if stays:
            parameter.data = _materialised(parameter.data, device)
            self.value = parameter
        else:
            self._move_in(parameter.data)

    def _move_in(self, whole: torch.Tensor) -> None:
        self.value = nn.Parameter(_waiting(whole, self._folder), requires_grad=False)
        self._whole = torch.empty(whole.shape, dtype=whole.dtype, device=self._device)
        self._absent = torch.full((), _nothing(whole.dtype), dtype=whole.dtype, device=self._device).expand(whole.shape)
        self._empty()

    def fetch(self) -> None:
        """One more use of the parameter, which has its values until as many `leave`."""
        self._uses += 1
        self._fill()

    def leave(self) -> None:
        self._uses -= 1
        if not self._uses and not self._in_backward:
            self._empty()

    def fetch_in_backward(self) -> None:
        self._in_backward = True
        self._fill()

    def leave_backward(self) -> None:
        self._in_backward = False
        if not self._uses:
            self._empty()

    def _fill(self) -> None:
        storage = self._whole.untyped_storage()
        if storage.nbytes() == 0:
            storage.resize_(self._whole.numel() * self._whole.element_size())
            self._whole.copy_(self.value.data)
            self._live.data = self._whole

    def _empty(self) -> None:
        self._whole.untyped_storage().resize_(0)
        self._live.data = self._absent  # NaN, so that who reads it past the backend sees it

    def cast(self, dtype: torch.dtype) -> None:
        if self.value.dtype == dtype:
            return
        whole = self.value.data.to(dtype)
        if self.stays:
            self.value.data = whole
        else:
            self._move_in(whole)


class OffloadedParameters(dict[nn.Parameter, OffloadedParameter]):
    """Of every parameter of a model, tied ones once."""


class _Fetch(ModelHook):
    """Brings a block's weights for the length of its forward and of its backward pass.

    Autograd runs in the reverse order of the forward: when the gradient of an input of the block arrives, nothing of
    the block is left to do. A block whose inputs need none is done at the end of the pass. A forward that is recomputed
    in a backward pass (gradient checkpointing) belongs to it: torch may end it early, before `post_forward`.
    """

    def __init__(self, offloaded: list[OffloadedParameter]) -> None:
        self._parameters = offloaded

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        if _in_backward():
            self._fetch_in_backward()
        else:
            for parameter in self._parameters:
                parameter.fetch()
        for tensor in _differentiable((args, kwargs)):
            tensor.register_hook(lambda _: self._leave_backward())
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for parameter in self._parameters if not _in_backward() else ():
            parameter.leave()
        for tensor in _differentiable(output):
            tensor.register_hook(lambda _: self._fetch_in_backward())
        return output

    def _fetch_in_backward(self) -> None:
        for parameter in self._parameters:
            parameter.fetch_in_backward()
        torch.autograd.Variable._execution_engine.queue_callback(self._leave_backward)

    def _leave_backward(self) -> None:
        for parameter in self._parameters:
            parameter.leave_backward()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def offload(model: nn.Module, device: torch.device, folder: Path | None, device_bytes: float) -> None:
    """Send the weights of a model to CPU memory, or to nameless files in `folder`. Blocks stay on the device, in
    the model's order, until they take `device_bytes`. Raises OSError when the disk is full."""
    offloaded, left = OffloadedParameters(), device_bytes
    for module, parameters in _blocks(model):
        new = [parameter for parameter in dict.fromkeys(parameters) if parameter not in offloaded]
        left -= sum(parameter.numel() * parameter.element_size() for parameter in new)
        offloaded |= {parameter: OffloadedParameter(parameter, device, folder, stays=left >= 0) for parameter in new}
        coming = [offloaded[parameter] for parameter in dict.fromkeys(parameters) if not offloaded[parameter].stays]
        if coming:
            add_hook_to_module(module, _Fetch(coming))
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    model.__dict__[_OFFLOADED] = offloaded


def offloaded_parameters(model: nn.Module) -> OffloadedParameters:
    return model.__dict__[_OFFLOADED]


def is_offloaded(model: nn.Module) -> bool:
    return _OFFLOADED in model.__dict__


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules and the parameters that come and go with them: every layer of a transformer as a whole (its class says
    which modules must not be split), and of everything else each module with parameters of its own."""
    classes, seen = set(getattr(model, "_no_split_modules", None) or ()), set()
    for module in model.modules():  # parents come first
        if module in seen:
            continue
        whole = type(module).__name__ in classes
        if whole:
            seen.update(module.modules())
        parameters = list(module.parameters(recurse=whole))
        if parameters:
            yield module, parameters


def _differentiable(tree: Any) -> Iterator[torch.Tensor]:
    if torch.is_grad_enabled():
        yield from (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.requires_grad)


def _waiting(whole: torch.Tensor, folder: Path | None) -> torch.Tensor:
    """A copy on the CPU, or in a file that goes when nobody uses it any more, also after a crash: it has no name."""
    if folder is None or not whole.numel():
        return whole.to("cpu", copy=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, whole.numel() * whole.element_size())  # a full disk says so here
        mapped = torch.from_file(file.name, shared=True, size=whole.numel(), dtype=whole.dtype)
    return mapped.view(whole.shape).copy_(whole)


def _materialised(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device).contiguous()


def _nothing(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else 0
