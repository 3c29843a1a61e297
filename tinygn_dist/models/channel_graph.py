"""Which channels of a convolutional net hang together: a walk over its exported graph.

A *space* is a set of channels that must go together: the filters of a convolution, the BatchNorm behind it, what reads
them, and everything a residual sum ties them to. Works on the meta device; no weight is read. What the walk does not
know freezes the channels that reach it, with the reason, so nothing is ever cut by guess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

SAME = frozenset(
    {
        "relu",
        "relu_",
        "relu6",
        "gelu",
        "silu",
        "silu_",
        "hardswish",
        "hardswish_",
        "hardtanh",
        "hardtanh_",
        "leaky_relu",
    }
    | {"leaky_relu_", "sigmoid", "tanh", "elu", "dropout", "dropout_", "alias", "clone", "contiguous", "max_pool2d"}
    | {"avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"}
)
"""operators that keep every channel on its own, where it was"""


@dataclass
class Space:
    """num channels that go together. slices: (tensor, dim, width): channel c owns entries c * width to (c + 1) * width
    - 1. readers: (module, width): modules whose input features c * width to (c + 1) * width - 1 are the channel. fixed:
    why the channels must stay, or None."""

    num: int
    slices: list[tuple[str, int, int]] = field(default_factory=list)
    readers: list[tuple[str, int]] = field(default_factory=list)
    fixed: str | None = None


@dataclass(frozen=True)
class _Axis:
    """Dim `dim` of a value holds the channels of a space, `width` consecutive features each."""

    dim: int
    space: int
    width: int = 1


def spaces(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[Space]:
    """The spaces of a net in the order in which they are made. inputs: a batch of 2 or more, on the model's device."""
    walk = _Walk(model, inputs)
    walk.run()
    return walk.result()


class _Whole(nn.Module):
    """A model as a function of tensors by position, which is what torch.export traces."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        out = self.model(**dict(zip(self.names, tensors, strict=True)))
        return out.logits if hasattr(out, "logits") else out[0]


class _Walk:
    def __init__(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        was_training = model.training
        program = torch.export.export(_Whole(model.eval(), tuple(inputs)), tuple(inputs.values()), strict=False)
        model.train(was_training)
        signature = program.graph_signature
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.names = {node: name.removeprefix("model.") for node, name in named.items()}
        self.nodes = list(program.graph.nodes)
        self.spaces: list[Space] = []
        self.parent: list[int] = []
        self.axes: dict[fx.Node, _Axis | None] = {}

    def run(self) -> None:
        for node in self.nodes:
            if node.op == "call_function":
                self.axes[node] = self._step(node)
            elif node.op == "output":
                for value in self._values(node.args[0]):
                    self._freeze(self.axes.get(value), "they are the model's outputs")

    def result(self) -> list[Space]:
        merged: dict[int, Space] = {}
        for index, space in enumerate(self.spaces):
            whole = merged.setdefault(self._root(index), Space(space.num))
            whole.slices += [piece for piece in space.slices if piece not in whole.slices]
            whole.readers += [reader for reader in space.readers if reader not in whole.readers]
            whole.fixed = whole.fixed or space.fixed
        return list(merged.values())

    def _step(self, node: fx.Node) -> _Axis | None:
        operator = str(node.target).removeprefix("aten.").partition(".")[0]
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        axis = self.axes.get(source) if source is not None else None
        match operator:
            case "conv2d":
                return self._convolution(node, axis)
            case "linear":
                return self._linear(node, axis)
            case "batch_norm":
                if axis is not None:
                    for given in node.args[1:5]:
                        self._owns(axis, given, 0)
                return axis
            case "add" | "add_" | "mul" | "mul_" | "sub":
                return self._combine(node)
            case "flatten" | "view" | "reshape":
                return self._flatten(node, axis)
            case "permute" if axis is not None:
                return _Axis([d % len(node.args[1]) for d in node.args[1]].index(axis.dim), axis.space, axis.width)
            case "mean" if axis is not None:
                return self._mean(node, axis)
            case _ if operator in SAME:
                return axis
        reason = "its norm runs over all of them" if "norm" in operator else f"the walk does not know {operator}"
        for value in self._values(node.args):
            self._freeze(self.axes.get(value), reason)
        return None

    def _convolution(self, node: fx.Node, axis: _Axis | None) -> _Axis:
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        out, per_group = self._shape(weight)[:2]
        groups = node.args[6] if len(node.args) > 6 else 1
        if groups != 1:
            depthwise = per_group == 1 and groups == out
            self._freeze(
                axis, "a depthwise convolution reads them" if depthwise else "a grouped convolution reads them"
            )
        elif axis is not None:
            self._reads(axis, weight)
        made = self._new(out)
        if groups != 1:
            self._freeze(made, "a grouped convolution makes them")
        for given in (weight, bias):
            self._owns(made, given, 0)
        return made

    def _linear(self, node: fx.Node, axis: _Axis | None) -> _Axis:
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        rank = len(self._shape(node.args[0]))
        if axis is not None and axis.dim == rank - 1:
            self._reads(axis, weight)
        else:
            self._freeze(axis, "a linear layer runs across them")
        made = _Axis(rank - 1, self._new(self._shape(weight)[0]).space)
        for given in (weight, bias):
            self._owns(made, given, 0)
        return made

    def _combine(self, node: fx.Node) -> _Axis | None:
        values = self._values(node.args)
        known = [self.axes.get(value) for value in values]
        axes = [axis for axis in known if axis is not None]
        if not axes or len(values) < 2:
            return axes[0] if axes else None
        shapes = [self._shape(value) for value in values]
        if len(axes) == 2 and shapes[0] == shapes[1] and axes[0].dim == axes[1].dim and axes[0].width == axes[1].width:
            self._join(axes[0].space, axes[1].space)
            return axes[0]
        for axis in axes:
            self._freeze(axis, "they are added to or multiplied by something of another shape")
        return axes[0]

    def _flatten(self, node: fx.Node, axis: _Axis | None) -> _Axis | None:
        before, after = self._shape(node.args[0]), self._shape(node)
        if axis is None or before == after:
            return axis
        if axis.dim == 1 and len(after) == 2 and after[1] == math.prod(before[1:]):
            return _Axis(1, axis.space, axis.width * math.prod(before[2:]))
        self._freeze(axis, "they are reshaped into something else")
        return None

    def _mean(self, node: fx.Node, axis: _Axis) -> _Axis | None:
        rank = len(self._shape(node.args[0]))
        gone = {dim % rank for dim in node.args[1]}
        if axis.dim in gone:
            self._freeze(axis, "their mean is taken")
            return None
        keeps = bool(node.args[2]) if len(node.args) > 2 else False
        return _Axis(axis.dim if keeps else axis.dim - sum(dim < axis.dim for dim in gone), axis.space, axis.width)

    # -- spaces --------------------------------------------------------------------------------------------------------
    def _new(self, num: int) -> _Axis:
        self.spaces.append(Space(num))
        self.parent.append(len(self.parent))
        return _Axis(1, len(self.spaces) - 1)

    def _root(self, index: int) -> int:
        while self.parent[index] != index:
            index = self.parent[index]
        return index

    def _join(self, one: int, other: int) -> None:
        low, high = sorted((self._root(one), self._root(other)))
        self.parent[high] = low

    def _freeze(self, axis: _Axis | None, reason: str) -> None:
        if axis is not None and self.spaces[axis.space].fixed is None:
            self.spaces[axis.space].fixed = reason

    def _owns(self, axis: _Axis, tensor: Any, dim: int) -> None:
        if tensor is not None:
            self.spaces[axis.space].slices.append((self.names[tensor.name], dim, axis.width))

    def _reads(self, axis: _Axis, weight: fx.Node) -> None:
        name = self.names[weight.name]
        self.spaces[axis.space].slices.append((name, 1, axis.width))
        self.spaces[axis.space].readers.append((name.removesuffix(".weight"), axis.width))

    @staticmethod
    def _shape(node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["val"].shape)

    @staticmethod
    def _values(args: Any) -> list[fx.Node]:
        found: list[fx.Node] = []
        fx.node.map_arg(args, lambda node: found.append(node))
        return found
