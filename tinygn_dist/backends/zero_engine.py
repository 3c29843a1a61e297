"""Training with a DeepSpeed engine, the same for every ZeRO stage.

Through Accelerate, DeepSpeed steps inside `backward` and clips by a number from its config file. Here the engine is
driven call by call, so that a training loop is backward, clip, step as everywhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from deepspeed import DeepSpeedEngine
from torch import nn

from tinygn_dist.backends.zero_partitions import drop_whole


class EngineOptimizer:
    """The optimizer of an engine, with the two calls of a training loop."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine = engine

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's, which holds the torch optimizer over the fp32 masters."""
        return self.engine.optimizer

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None:
        """The engine has dropped the gradients in its step."""


def start(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """(engine, optimizer) for a model and an optimizer over its parameters, with the job's DeepSpeed config."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    if config.get("train_micro_batch_size_per_gpu", "auto") == "auto":
        config["train_micro_batch_size_per_gpu"] = 1  # only multiplied up and logged: the caller scales its losses
    config["gradient_accumulation_steps"] = 1  # DeepSpeed would divide the losses by it
    config.pop("train_batch_size", None)
    config["zero_force_ds_cpu_optimizer"] = False  # with offload_optimizer another one would take its place
    with keeping_buffers(model):
        engine, _ = accelerator.prepare(model, optimizer)
    return engine, EngineOptimizer(engine)


@contextlib.contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """A bf16 engine casts the buffers too; rotary frequencies in bf16 are wrong from the first hundred tokens on."""
    before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    yield
    for name, buffer in model.named_buffers():
        buffer.data = before[name].to(buffer.device)


@contextlib.contextmanager
def boundary(engine: DeepSpeedEngine, last: bool) -> Iterator[None]:
    """The backward inside is the last of a step, or one of those before."""
    engine.set_gradient_accumulation_boundary(last)
    yield


def clip(engine: DeepSpeedEngine, max_norm: float) -> None:
    """Take effect in the coming step, where the norm of the whole gradient is known."""
    engine.optimizer.clip_grad = max_norm


def _nothing() -> None: ...


class AroundStep:
    """Calls `before()` at the end of every accumulation and `after()` when its step was not skipped, until `remove()`.

    Hooks of the torch optimizer fire once per group or sub-group, before the live weights are written, and Accelerate
    steps inside its `backward`: the engine's own step is the only place where a step begins and is over.
    """

    def __init__(
        self, engine: DeepSpeedEngine, before: Callable[[], None] = _nothing, after: Callable[[], None] = _nothing
    ) -> None:
        self._before, self._after = before, after
        inner = engine.step

        def step(*arguments: Any, **named: Any) -> None:
            if engine.is_gradient_accumulation_boundary():
                self._before()
            done = engine.global_steps - engine.skipped_steps
            inner(*arguments, **named)
            if engine.global_steps - engine.skipped_steps > done:
                self._after()

        engine.step = step

    def remove(self) -> None:
        """The wrapper stays, and does nothing: others may have been put around it."""
        self._before = self._after = _nothing


@contextlib.contextmanager
def without_gradient_hooks(engine: DeepSpeedEngine) -> Iterator[None]:
    """Inside, gradients stay where autograd puts them; the engine would reduce them and take them for its next step.
    No gradient may be waiting: between two steps."""
    optimizer = engine.optimizer
    hooks = optimizer._grad_acc_hooks
    leaves = getattr(optimizer, "_leaf_module_hooks", [])
    for hook in [*hooks, *leaves]:
        hook.remove()
    had = bool(hooks or leaves)
    hooks.clear()
    leaves.clear()
    try:
        yield
    finally:
        if had and hasattr(optimizer, "create_gradient_handling_hooks"):
            optimizer.create_gradient_handling_hooks()
        elif had:
            for parameter in engine.module.parameters():
                drop_whole(parameter)  # those that stay whole are still marked by the backward inside
            optimizer.create_reduce_and_remove_grad_hooks()
