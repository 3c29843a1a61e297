"""Accelerate hooks that multiply, replace or observe activations, and the context that attaches them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from tinygn_dist.models.anatomy import UnitGroup

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

    factors: (units,) or (batch, units); each unit is `width` consecutive features: of the last dim, or of dim 1 of an
    image's feature map. The input may come with its batch and sequence dims flattened into one (OPT).
    """

    def __init__(self, factors: torch.Tensor, width: int) -> None:
        self.factors, self.width = factors, width

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        hidden = args[0]
        factors = self.factors.to(hidden.dtype).repeat_interleave(self.width, -1)
        if isinstance(module, nn.Conv2d):
            factors = factors[..., None, None]
        elif factors.dim() == 2:
            flat = hidden.dim() == 2
            factors = (
                factors.repeat_interleave(len(hidden) // len(factors), 0)
                if flat
                else (factors[:, None] if hidden.dim() == 3 else factors)
            )
        return (hidden * factors, *args[1:]), kwargs


class RoutingGate(ModelHook):
    """Multiplies the routing weight of each expert by its factor: the gate on an expert's output. A factor of 0 is not
    removal, because the router does not hand the expert's share to the others.

    factors: (experts,) or (batch, experts).
    """

    def __init__(self, factors: torch.Tensor) -> None:
        self.factors = factors

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        hidden, chosen, weights = args  # (tokens, hidden), and (tokens, top k) twice
        factors = self.factors.to(weights.dtype)
        if factors.dim() == 2:
            factors = factors.repeat_interleave(len(hidden) // len(factors), 0).gather(1, chosen)
        else:
            factors = factors[chosen]
        return (hidden, chosen, weights * factors), kwargs


class RouterMask(ModelHook):
    """Routes as if only the `kept` experts existed: the router chooses with their rows alone, whatever rule it has
    (softmax before or after the choice, renormalised or not), and its choice is translated back.

    kept: (experts that stay,) int64, ascending.
    """

    def __init__(self, kept: torch.Tensor) -> None:
        self.kept = kept

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        whole = dict(module._parameters)  # here and not after the forward, when offloaded weights are gone again
        try:
            for name, parameter in whole.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter[self.kept], requires_grad=False)
            _, weights, chosen = type(module).forward(module, *args, **kwargs)  # without hooks, this one included
        finally:
            module._parameters.update(whole)
        self._routing = weights, self.kept[chosen]
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        routing, self._routing = self._routing, None
        return output[0], *routing


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
        gated = hidden + (factors if factors.dim() == 0 else factors.view(-1, *(1,) * (added.dim() - 1))) * added
        return with_first(output, gated)


class _OutputShift(ModelHook):
    def __init__(self, shift: torch.Tensor) -> None:
        self.shift = shift

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output + self.shift.to(output.device, output.dtype)


def shifted(bare: nn.Module, shifts: Mapping[str, torch.Tensor]) -> contextlib.AbstractContextManager[None]:
    """Inside the context these biases, by their names, are larger by so much."""
    return attached(
        [(bare.get_submodule(name.rpartition(".")[0]), _OutputShift(shift)) for name, shift in shifts.items()]
    )


class Observer(ModelHook):
    """Calls `seen(input, output)` with a module's first input and output; `output` is None for inputs only. Not where
    the hook is called for a module that does not run: transformers does so for weights that it multiplies itself."""

    def __init__(self, seen: Callable[[torch.Tensor, Any], None], *, output: bool = False) -> None:
        self.seen, self.output = seen, output

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        hidden = first_input(args, kwargs)
        if self.output:
            self._hidden = hidden
        elif hidden is not None:
            self.seen(hidden, None)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if self.output:
            hidden, self._hidden = self._hidden, None
            if hidden is not None:
                self.seen(hidden, output)
        return output


def unit_gates(bare: nn.Module, group: UnitGroup, factors: torch.Tensor) -> list[tuple[nn.Module, ModelHook]]:
    """The hooks that multiply every unit of a group by its factor, and where they go: to all that read the units."""
    if group.router:
        return [(bare.get_submodule(group.output), RoutingGate(factors))]
    return [(bare.get_submodule(module), InputGate(factors, width)) for module, width in group.readers]


def routed_to(bare: nn.Module, kept: Mapping[UnitGroup, Sequence[int]]) -> contextlib.AbstractContextManager[None]:
    """Inside the context, tokens of these groups are routed between the kept experts only."""
    device = next(bare.parameters()).device
    return attached(
        [(bare.get_submodule(g.router), RouterMask(torch.tensor(units, device=device))) for g, units in kept.items()]
    )


def first_input(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """What a module reads, given by place or by name; None where it is given nothing."""
    named = (kwargs[name] for name in ("hidden_states", "input", "x") if name in kwargs)
    value = args[0] if args else next(named, None)
    return value if isinstance(value, torch.Tensor) else None


def first(output: Any) -> torch.Tensor:
    """The hidden states of a layer that returns them alone or at the head of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, hidden: torch.Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
