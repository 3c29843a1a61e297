"""Which tensors make up a model's units and targets. Reads module structure only, so it works on the meta device.

A *unit group* is all units of one kind in one layer: `num_units` blocks of `output_width` consecutive input features
of the module `output` (the tensor a gate multiplies), plus the rows of the modules that produce them. A *target* is
one linear weight that can be masked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tinygn_dist.errors import Refused, UserError
from tinygn_dist.families import Family, Part, family_of, supported


@dataclass(frozen=True)
class Target:
    """A weight matrix that can be masked.

    `name` is the parameter's name without wrapper prefixes, `shape` is (out, in) whatever the storage, `input_dim`
    the storage dim along which inputs lie (1 for Linear, 0 for GPT-2's Conv1D).
    """

    name: str
    module: str
    layer: int
    shape: tuple[int, int]
    input_dim: int

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def stored_shape(self) -> tuple[int, int]:
        return self.shape if self.input_dim == 1 else self.shape[::-1]

    def matrix(self, stored: torch.Tensor) -> torch.Tensor:
        """(out, in) view of the stored parameter; in-place edits reach it."""
        return stored if self.input_dim == 1 else stored.t()

    def per_input(self, values: torch.Tensor, piece: torch.Tensor, offset: int) -> torch.Tensor:
        """values (in,), one per input feature, laid out like `piece`: a run of the stored elements from `offset` on."""
        if self.input_dim == 1 and piece.dim() == 2:
            return values.expand(piece.shape)
        width = self.stored_shape[1]
        first, last = offset // width, -(-(offset + piece.numel()) // width)
        one_each = values.repeat(last - first) if self.input_dim == 1 else values[first:last].repeat_interleave(width)
        start = offset - first * width
        return one_each[start : start + piece.numel()].view(piece.shape)


@dataclass(frozen=True)
class Rows:
    """`width` consecutive output features per unit, in one block of a module's output."""

    part: Part
    width: int


@dataclass(frozen=True)
class UnitGroup:
    kind: str
    layer: int
    num_units: int
    inputs: tuple[Rows, ...]
    output: str
    output_width: int
    unit_params: int


@dataclass(frozen=True)
class Anatomy:
    family: Family | None
    layers_path: str
    layer_params: tuple[int, ...]
    groups: tuple[UnitGroup, ...]
    targets: tuple[Target, ...]
    tied: tuple[tuple[str, str], ...]
    total_params: int

    @property
    def num_layers(self) -> int:
        return len(self.layer_params)

    def of_kind(self, kind: str) -> tuple[UnitGroup, ...]:
        """The unit groups of one kind, in layer order."""
        return tuple(group for group in self.groups if group.kind == kind)

    def target_of(self, module: str) -> Target:
        """The target that is the weight of a module."""
        return next(target for target in self.targets if target.module == module)

    def choose_targets(self, wanted: Iterable[str], ignored: Iterable[str]) -> tuple[Target, ...]:
        """Targets whose name matches a `wanted` and no `ignored` regular expression. A pattern that matches nothing
        is a UserError, so a typo cannot end in an untouched model."""
        names = [target.name for target in self.targets]
        for pattern in (*wanted, *ignored):
            try:
                hit = any(re.search(pattern, name) for name in names)
            except re.error as error:
                raise UserError(f"pattern {pattern!r} is not a regular expression ({error})") from None
            if not hit:
                raise UserError(f"pattern {pattern!r} matches no weight; weights are named like {', '.join(names[:3])}")
        chosen = tuple(
            target
            for target in self.targets
            if any(re.search(p, target.name) for p in wanted) and not any(re.search(p, target.name) for p in ignored)
        )
        if not chosen:
            raise UserError("targets and ignore together leave no weight to prune; narrow ignore")
        return chosen


def read_anatomy(model: nn.Module, *, needs_units: bool) -> Anatomy:
    """Anatomy of a transformers model, on any device.

    Raises Refused when `needs_units` and the family is not known, or when the model has no maskable weight.
    """
    model_type = model.config.model_type
    family = family_of(model_type)
    if family is None and needs_units:
        raise Refused(f"units of model type {model_type!r} cannot be removed, supported: {supported()}")
    layers_path = _layers_path(model, family) if family else ""
    layers = model.get_submodule(layers_path) if family else ()
    names = {id(module): name for name, module in model.named_modules()}
    groups = []
    for index, layer in enumerate(layers):
        prefix = names[id(layer)] + "."
        groups += _unit_groups(model, family, index, prefix)
    parameters = dict(model.named_parameters())
    return Anatomy(
        family=family,
        layers_path=layers_path,
        layer_params=tuple(sum(p.numel() for p in layer.parameters()) for layer in layers),
        groups=tuple(groups),
        targets=tuple(_targets(model, layers_path)),
        tied=tuple(sorted((getattr(model, "all_tied_weights_keys", None) or {}).items())),
        total_params=sum(p.numel() for p in parameters.values()),
    )


def input_features(module: nn.Module) -> int:
    """Features a Linear or Conv1D reads."""
    return module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]


def _layers_path(model: nn.Module, family: Family) -> str:
    layers = model.base_model.get_submodule(family.layers)
    return next(name for name, module in model.named_modules() if module is layers)


def _unit_groups(model: nn.Module, family: Family, layer: int, prefix: str) -> list[UnitGroup]:
    groups, config = [], model.config
    attention = family.attention
    if attention.fixed is None:
        num_groups = getattr(config, attention.num_kv_heads)
        output = prefix + attention.output
        width = input_features(model.get_submodule(output)) // num_groups
        rows = tuple(
            _rows(model, part._replace(path=prefix + part.path), num_groups)
            for part in (attention.query, attention.key, attention.value)
        )
        groups.append(_group(model, "heads", layer, num_groups, rows, output, width))
    ffn = family.feed_forward
    output = prefix + ffn.output
    channels = input_features(model.get_submodule(output))
    rows = tuple(_rows(model, Part(prefix + path), channels) for path in ffn.inputs)
    groups.append(_group(model, "channels", layer, channels, rows, output, 1))
    return groups


def _rows(model: nn.Module, part: Part, num_units: int) -> Rows:
    module = model.get_submodule(part.path)
    features = module.out_features if isinstance(module, nn.Linear) else module.weight.shape[1]
    width, rest = divmod(features // part.of, num_units)
    if rest:
        raise Refused(f"{part.path} has {features // part.of} output features, not a multiple of its {num_units} units")
    return Rows(part, width)


def _group(
    model: nn.Module, kind: str, layer: int, num_units: int, rows: tuple[Rows, ...], output: str, width: int
) -> UnitGroup:
    params = width * model.get_submodule(output).weight.numel() // input_features(model.get_submodule(output))
    for row in rows:
        module = model.get_submodule(row.part.path)
        params += row.width * (input_features(module) + (module.bias is not None))
    return UnitGroup(kind, layer, num_units, rows, output, width, params)


def _targets(model: nn.Module, layers_path: str) -> Iterable[Target]:
    """Linear weights inside the layers; of an unknown family, all but the output head. Shared ones once."""
    seen, head = set(), model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or id(module.weight) in seen or module is head:
            continue
        if layers_path and not name.startswith(layers_path + "."):
            continue
        seen.add(id(module.weight))
        layer = int(name.removeprefix(layers_path + ".").split(".")[0]) if layers_path else 0
        stored = tuple(module.weight.shape)
        input_dim = 1 if isinstance(module, nn.Linear) else 0
        yield Target(f"{name}.weight", name, layer, (stored[1 - input_dim], stored[input_dim]), input_dim)
    unreachable = [name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name]
    if unreachable:
        raise Refused(
            f"{unreachable[0]} is a fused expert tensor, which cannot be masked yet; accepted: models whose "
            "layers are made of Linear or Conv1D"
        )
    if not seen:
        raise Refused(f"model type {model.config.model_type!r} has no Linear or Conv1D weight to prune")
