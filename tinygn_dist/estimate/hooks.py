"""Accelerate hooks that multiply, replace or observe activations, and the context that attaches them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

_HOOKED = ("forward", "_hf_hook", "_old_forward")


@contextlib.contextmanager
def attached(hooks: Iterable[tuple[nn.Module, ModelHook]]) -> Iterator[None]:
    """Hooks on modules for the length of the context; hooks that were there before (offloading) keep working and are
    left exactly as they were."""
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for module, hook in hooks:
            before.append((module, {name: module.__dict__[name] for name in _HOOKED if name in module.__dict__}))
            add_hook_to_module(module, hook, append="_hf_hook" in module.__dict__)
        yield
    finally:
        for module, state in reversed(before):
            for name in _HOOKED:
                module.__dict__.pop(name, None)
            module.__dict__.update(state)


class InputGate(ModelHook):
    """Multiplies a module's input by one factor per unit.

    factors: (units,) or (batch, units); each unit is `width` consecutive features. The input may come with its batch
    and sequence dims flattened into one (OPT).
    """

    def __init__(self, factors: torch.Tensor, width: int) -> None:
        self.factors, self.width = factors, width

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        hidden = args[0]
        factors = self.factors.to(hidden.dtype).repeat_interleave(self.width, -1)
        if factors.dim() == 2:
            flat = hidden.dim() == 2
            factors = factors.repeat_interleave(len(hidden) // len(factors), 0) if flat else factors[:, None]
        return (hidden * factors, *args[1:]), kwargs


class LayerGate(ModelHook):
    """Multiplies what a layer adds to the residual stream: output = input + factor * (output - input).

    factors: 0-dim or (batch,).
    """

    def __init__(self, factors: torch.Tensor) -> None:
        self.factors = factors

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        self._hidden = args[0] if args else kwargs["hidden_states"]
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        hidden, self._hidden = self._hidden, None
        added = first(output) - hidden
        factors = self.factors.to(added.dtype)
        gated = hidden + (factors if factors.dim() == 0 else factors.view(-1, 1, 1)) * added
        return with_first(output, gated)


class Observer(ModelHook):
    """Calls `seen(input, output)` with a module's first input and output; `output` is None for inputs only."""

    def __init__(self, seen: Callable[[torch.Tensor, Any], None], *, output: bool = False) -> None:
        self.seen, self.output = seen, output

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.output:
            self._hidden = hidden
        else:
            self.seen(hidden, None)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if self.output:
            hidden, self._hidden = self._hidden, None
            self.seen(hidden, output)
        return output


def first(output: Any) -> torch.Tensor:
    """The hidden states of a layer that returns them alone or at the head of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, hidden: torch.Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
