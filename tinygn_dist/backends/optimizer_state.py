"""Third part of the contract: a model in training, and what is the same about it on every backend.

| operation                            | meaning                                                                   |
|--------------------------------------|---------------------------------------------------------------------------|
| adopt(model, optimizer)              | a model that the caller prepared, with the same Accelerator, for training   |
| wrapped(model)                       | what the Accelerator made of a bare model                                   |
| on_state(save, load)                 | take part in the caller's save_state and load_state                         |
| place_added / added_are_gone          | modules with parameters of their own, for the time of a training           |
| no_sync / backward / clip_grad_norm  | one optimizer step made of micro-batches                                    |
| inner_optimizer(optimizer)           | the torch optimizer whose step really moves the weights                     |
| keeps_codes(optimizer)               | whether its state can only be kept or dropped as a whole                   |
| after_step(model, optimizer, call)   | `call()` once after every step that moved the weights, which are in place   |
| before_step(model, optimizer, call)  | `call()` before the weights move                                            |
| paused(model)                        | context: the model in training, to be estimated and edited between two steps|
| held(model, optimizer, name)         | what the torch optimizer holds of a parameter on this rank                  |
| on_gradients(model, optimizer, ...)  | each gradient that the torch optimizer is about to use, which may be edited |
| held_weight / join_held / cut_held   | a parameter, or numbers beside it, in that layout, and whole                |
| clear_state(model, optimizer, t, at) | zero the optimizer's state of some weights of a matrix                      |
| whole_training / write_training      | everything training knows of a parameter, whole: to save it and to go on     |

The optimizer may hold a parameter itself (one process, DDP), this rank's rows of it (FSDP2), or fp32 masters of many
parameters in one flat tensor (ZeRO). `held` says where a parameter lies in it; the rest follows from that alone, so a
checkpoint made of whole tensors fits any backend at any world size.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinygn_dist.backends.row_work import RowWork
from tinygn_dist.backends.wrappers import running_plainly
from tinygn_dist.models.anatomy import Matrix


@dataclass(frozen=True)
class Held:
    """tensor: what the torch optimizer steps, and the key of its state. Elements [low, low + count) of the flattened
    piece of it on this rank are elements [start, start + count) of the flattened parameter; count may be 0."""

    tensor: torch.Tensor
    low: int
    start: int
    count: int


class Training(RowWork):
    # -- what backends say -------------------------------------------------------------------------------------------
    steps_plain_tensors = True
    """whether what the optimizer holds are plain tensors, and no DTensors"""

    @abstractmethod
    def release(self, model: nn.Module, *prepared: Any) -> None: ...

    @abstractmethod
    def no_sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager: ...

    @abstractmethod
    def held(self, model: nn.Module, optimizer: Any, name: str) -> Held: ...

    @abstractmethod
    def write_whole(self, model: nn.Module, name: str, whole: torch.Tensor) -> None:
        """New values of a whole parameter, the same tensor on every rank, in the live weight and any master copy."""

    def adopt(self, model: nn.Module, optimizer: Any) -> None:
        """Where the live weights are what the optimizer steps, there is only to see that they are whole."""
        self.refuse_spread(model)

    def place_added(self, model: nn.Module, added: Sequence[nn.Module]) -> None:
        """Modules that were put into a placed model, with the same values on every rank and on its device, are placed
        as the model is, before `prepare` with an optimizer. They run within the modules that they were put into."""
        return

    def added_are_gone(self, model: nn.Module) -> None:
        """They were taken out, after the last step."""
        return

    def join_pieces(self, whole: torch.Tensor) -> None:
        """Sum in place over the ranks whose `held` pieces make up a parameter; nothing where each holds all of it."""
        return

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's piece of a tensor in the optimizer."""
        return tensor

    def pausing(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """What `paused` needs beyond eval mode, so that a backward of the bare model does not feed the optimizer."""
        return contextlib.nullcontext()

    def wrapped(self, model: nn.Module) -> nn.Module:
        """What the Accelerator made of a model, for who knows the bare one only."""
        return model

    def on_state(self, save: Callable[[Path], None], load: Callable[[Path], None]) -> None:
        """Called with the folder, on every rank, whenever the caller's Accelerator saves or loads its state."""
        self._accelerator.register_save_state_pre_hook(lambda models, weights, folder: save(Path(folder)))
        self._accelerator.register_load_state_pre_hook(lambda models, folder: load(Path(folder)))

    # -- steps -------------------------------------------------------------------------------------------------------
    def inner_optimizer(self, optimizer: Any) -> torch.optim.Optimizer:
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer

    def keeps_codes(self, optimizer: Any) -> bool:
        """Whether an optimizer's state is 8-bit codes, among which zero is not 0 (bitsandbytes says so in its
        `args`)."""
        return getattr(getattr(self.inner_optimizer(optimizer), "args", None), "optim_bits", 32) == 8

    def after_step(self, model: nn.Module, optimizer: Any, call: Callable[[], None]) -> Any:
        """Returns a handle with `remove()`. A step that a gradient scaler skips does not count."""
        return self.inner_optimizer(optimizer).register_step_post_hook(lambda *_: call())

    def before_step(self, model: nn.Module, optimizer: Any, call: Callable[[], None]) -> Any:
        """The weights are as the last step left them, unless something else wrote to them."""
        return self.inner_optimizer(optimizer).register_step_pre_hook(lambda *_: call())

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        """Scale the gradients of the coming step so that the norm of them all is at most max_norm."""
        self._accelerator.clip_grad_norm_(parameters, max_norm)

    @contextlib.contextmanager
    def paused(self, model: nn.Module) -> Iterator[nn.Module]:
        """In eval mode inside; afterwards every module's mode is as it was."""
        running = self.running(model)
        modes = [(module, module.training) for module in running.modules()]
        running.eval()
        try:
            with self.pausing(model), running_plainly(running):
                yield running
        finally:
            for module, training in modes:
                module.training = training

    def on_gradients(
        self,
        model: nn.Module,
        optimizer: Any,
        names: Iterable[str],
        call: Callable[[str, torch.Tensor, torch.Tensor], None],
    ) -> Any:
        """call(name, weight, gradient) before every step, for each of these parameters of which this rank's torch
        optimizer holds some: flat views, unscaled and clipped. Returns a handle with `remove()`."""
        names = list(names)

        def hook(stepping: torch.optim.Optimizer, *_: Any) -> None:
            present = {id(p) for group in stepping.param_groups for p in group["params"] if p.grad is not None}
            for name in names:
                held = self.held(model, optimizer, name)
                if held.count and id(held.tensor) in present:
                    call(name, self._piece(held.tensor.detach(), held), self._piece(held.tensor.grad, held))

        return self.inner_optimizer(optimizer).register_step_pre_hook(hook)

    # -- the optimizer's state ---------------------------------------------------------------------------------------
    def clear_state(self, model: nn.Module, optimizer: Any, matrix: Matrix, at: torch.Tensor) -> None:
        """at: bool, shaped like this rank's shard of the matrix."""
        held = self.held(model, optimizer, matrix.parameter)
        low, high = max(held.start, matrix.start), min(held.start + held.count, matrix.start + matrix.numel)
        if high <= low:
            return
        first = low - matrix.start - self.shard(model, matrix).offset
        at = at.reshape(-1)[first : first + high - low]
        for state in self._states(optimizer, held).values():
            self._piece(state, held)[low - held.start : high - held.start].masked_fill_(at, 0)

    def whole_training(self, model: nn.Module, optimizer: Any, name: str) -> dict[str, torch.Tensor]:
        """`weight` (the fp32 master where there is one) and every state of the optimizer by its name, flat and whole on
        every rank, on the CPU. A collective. Single numbers, such as Adam's step count, are 0-dim."""
        held = self.held(model, optimizer, name)
        found = {"weight": held.tensor.detach(), **self._states(optimizer, held)}
        pieces = {key: self._piece(tensor, held) for key, tensor in found.items()}
        whole = {key: self.join_held(model, optimizer, name, piece).cpu() for key, piece in pieces.items()}
        return whole | self._numbers(optimizer, held)

    def held_weight(self, model: nn.Module, optimizer: Any, name: str) -> torch.Tensor:
        """Flat view of this rank's piece of a parameter, as the torch optimizer holds it."""
        held = self.held(model, optimizer, name)
        return self._piece(held.tensor.detach(), held)

    def join_held(self, model: nn.Module, optimizer: Any, name: str, piece: torch.Tensor) -> torch.Tensor:
        """Flat and whole on every rank, from pieces shaped like `held_weight`. A collective."""
        held = self.held(model, optimizer, name)
        full = torch.zeros(self.num_elements(model, name), dtype=piece.dtype, device=piece.device)
        full[held.start : held.start + held.count] = piece
        # as integers: a sum with the zeros of the other ranks would turn -0.0 into 0.0
        self.join_pieces(full.view(torch.int32) if full.element_size() == 4 else full.view(torch.uint8))
        return full

    def cut_held(self, model: nn.Module, optimizer: Any, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's piece, shaped like `held_weight`, of a flat whole tensor."""
        held = self.held(model, optimizer, name)
        return whole[held.start : held.start + held.count]

    def write_training(self, model: nn.Module, optimizer: Any, name: str, whole: Mapping[str, torch.Tensor]) -> None:
        """What `whole_training` returned, on any backend and at any world size."""
        self.write_whole(model, name, whole["weight"])
        held = self.held(model, optimizer, name)
        state = self.inner_optimizer(optimizer).state[held.tensor]
        for key, value in whole.items():
            if value.dim() == 0:
                state[key] = value.clone()
            elif key == "weight":
                self._piece(held.tensor.detach(), held).copy_(value[held.start : held.start + held.count])
            else:
                if key not in state:
                    state[key] = torch.zeros_like(held.tensor.detach())
                self._piece(state[key], held).copy_(value[held.start : held.start + held.count])

    def num_elements(self, model: nn.Module, name: str) -> int:
        return self.unwrap(model).get_parameter(name).numel()

    def _piece(self, tensor: torch.Tensor, held: Held) -> torch.Tensor:
        return self.local(tensor).view(-1)[held.low : held.low + held.count]

    def _states(self, optimizer: Any, held: Held) -> dict[str, torch.Tensor]:
        state = self.inner_optimizer(optimizer).state.get(held.tensor, {})
        return {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == held.tensor.shape}

    def _numbers(self, optimizer: Any, held: Held) -> dict[str, torch.Tensor]:
        state = self.inner_optimizer(optimizer).state.get(held.tensor, {})
        return {k: v.detach().cpu().clone() for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim() == 0}
