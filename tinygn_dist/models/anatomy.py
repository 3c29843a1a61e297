"""Which tensors make up a model's units and matrices. Reads module structure only, so it works on the meta device.

A *unit group* is all units of one kind in one layer, with the slices of tensors that go with each unit and the module
whose input their gates multiply. A *matrix* is one linear weight matrix that can be masked: the weight of a Linear or
Conv1D, or one expert's matrix in a fused 3-D parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tinygn_dist.errors import Refused, UserError
from tinygn_dist.models.channel_graph import spaces
from tinygn_dist.models.families import family_of, fixed_units, supported
from tinygn_dist.models.family_schema import Family, Part
from tinygn_dist.models.matrices import Matrix, find_matrices, input_features
from tinygn_dist.models.stacks import Stack, find_stacks, layer_of


@dataclass(frozen=True)
class Slice:
    """Unit u owns entries start + u * width to start + (u + 1) * width - 1 along `dim` of the named tensor."""

    tensor: str
    dim: int
    start: int
    width: int


@dataclass(frozen=True)
class UnitGroup:
    """All units of one kind in one layer.

    slices: everything that goes with a unit. output: the module whose input the gates multiply: `output_width`
    consecutive features per unit (for experts: the experts module, whose routing weights they multiply). also_read_by:
    further modules that read the units, with their features per unit (filters; `layer` then only numbers the groups). router: the
    module that chooses between the units, if any. least: how many have to stay. added: whether `output` is known to write straight
    to the residual stream (`FeedForward.added`).
    """

    kind: str
    layer: int
    num_units: int
    slices: tuple[Slice, ...]
    output: str
    output_width: int
    unit_params: int
    router: str | None = None
    least: int = 1
    also_read_by: tuple[tuple[str, int], ...] = ()
    added: bool = False

    @property
    def readers(self) -> tuple[tuple[str, int], ...]:
        """(module, input features per unit) of every module that reads the units."""
        return ((self.output, self.output_width), *self.also_read_by)


@dataclass(frozen=True)
class Anatomy:
    family: Family | None
    stacks: tuple[Stack, ...]
    layer_params: tuple[int, ...]
    groups: tuple[UnitGroup, ...]
    matrices: tuple[Matrix, ...]
    tied: tuple[tuple[str, str], ...]
    total_params: int
    fixed: Mapping[str, str] = field(default_factory=dict)
    """unit kinds that cannot be removed, each with the reason"""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """of every parameter of a convolutional net"""
    model_class: str = ""
    hidden: UnitGroup | None = None
    """the dimensions of the residual stream; `least`: their number is a multiple of it"""

    @property
    def num_layers(self) -> int:
        return len(self.layer_params)

    @property
    def layers_path(self) -> str:
        """The list of layers; nothing where there is none, or several, or a forward cannot start at any of them."""
        return self.stacks[0].path if len(self.stacks) == 1 and self.starts_anywhere else ""

    @property
    def starts_anywhere(self) -> bool:
        """Whether a forward may begin at any layer (`Family.starts_anywhere`)."""
        return self.family is None or self.family.starts_anywhere

    def path_of(self, layer: int) -> str:
        """The module of a layer."""
        stack = next(stack for stack in self.stacks if layer in stack.layers)
        return f"{stack.path}.{layer - stack.first}"

    def layer_of(self, name: str) -> int | None:
        """The layer that a module or parameter lies in, if any."""
        return layer_of(self.stacks, name)

    @property
    def lasting(self) -> frozenset[int]:
        """Layers that stay: of several stacks each keeps its first, which in T5 holds the position bias of all."""
        return frozenset(stack.first for stack in self.stacks) if len(self.stacks) > 1 else frozenset()

    def of_kind(self, kind: str) -> tuple[UnitGroup, ...]:
        """The unit groups of one kind, in layer order."""
        return tuple(group for group in self.groups if group.kind == kind)

    def matrix_of(self, module: str) -> Matrix:
        """The matrix that is the weight of a module."""
        return next(matrix for matrix in self.matrices if matrix.module == module)

    def choose_matrices(self, wanted: Iterable[str], ignored: Iterable[str]) -> tuple[Matrix, ...]:
        """Targets whose name matches a `wanted` and no `ignored` regular expression. A pattern that matches nothing
        is a UserError, so a typo cannot end in an untouched model."""
        names = [matrix.name for matrix in self.matrices]
        for pattern in (*wanted, *ignored):
            try:
                hit = any(re.search(pattern, name) for name in names)
            except re.error as error:
                raise UserError(f"pattern {pattern!r} is not a regular expression ({error})") from None
            if not hit:
                raise UserError(f"pattern {pattern!r} matches no weight; weights are named like {', '.join(names[:3])}")
        chosen = tuple(
            matrix
            for matrix in self.matrices
            if any(re.search(p, matrix.name) for p in wanted) and not any(re.search(p, matrix.name) for p in ignored)
        )
        if not chosen:
            raise UserError("matrices and ignore together leave no weight to prune; narrow ignore")
        return chosen


def read_anatomy(model: nn.Module, *, needs_units: bool) -> Anatomy:
    """Anatomy of a transformers model, on any device.

    Raises Refused when `needs_units` and the family is not known, or when the model has no maskable weight.
    """
    model_type = model.config.model_type
    family = family_of(model_type)
    if family is None and needs_units:
        raise Refused(f"units of model type {model_type!r} cannot be removed, supported: {supported()}")
    stacks = find_stacks(model, family) if family and family.layers else ()
    layers = [layer for stack in stacks for layer in model.get_submodule(stack.path)]
    groups = []
    for stack in stacks:
        if family.stack_heads:
            groups.append(_stack_heads(model, family, stack))
        for index in range(stack.num):
            groups += _unit_groups(model, family, stack.first + index, f"{stack.path}.{index}.")
    if family and family.filters:
        groups += _filter_groups(model, family)
    layer_params = tuple(sum(p.numel() for p in layer.parameters()) for layer in layers)
    fixed = fixed_units(family, model.config) if family else {}
    sparse = {group.layer for group in groups if group.kind == "experts"}
    if 0 < len(sparse) < len(layers):
        fixed["layers"] = (
            f"{len(layers) - len(sparse)} of its {len(layers)} layers have no experts, so what goes with a layer depends on "
            "which one it is, and their positions are part of its config"
        )
    if len(stacks) > 1:
        fixed["layers"] = (
            f"layers of its {len(stacks)} stacks differ in size, so what goes with a number of parameters depends on which "
            "ones go; say how many with prune.counts"
        )
    if family and family.stack_heads:
        fixed["heads"] = (
            "the layers of a stack share one position bias per head, so a head goes from all of them at once, and how much that is "
            "depends on the stack; say how many with prune.counts"
        )
    return Anatomy(
        family=family,
        stacks=stacks,
        layer_params=layer_params,
        groups=tuple(groups),
        matrices=tuple(find_matrices(model, stacks)),
        tied=tuple(sorted((getattr(model, "all_tied_weights_keys", None) or {}).items())),
        total_params=sum(p.numel() for p in model.parameters()),
        fixed=fixed,
        model_class=type(model).__name__,
        hidden=_hidden_group(model, family, stacks) if family and family.residual else None,
        shapes={n: tuple(p.shape) for n, p in model.named_parameters()} if family and family.filters else {},
    )


def _unit_groups(model: nn.Module, family: Family, layer: int, prefix: str) -> Iterator[UnitGroup]:
    config, attention, experts = model.config, family.attention, family.experts
    ffn = next((f for f in family.feed_forwards if all(_has_module(model, prefix + p.path) for p in f.inputs)), None)
    if attention and "heads" not in fixed_units(family, config):
        num_groups = getattr(config, attention.num_kv_heads)
        per_group = getattr(config, attention.num_heads) // num_groups
        slices = [piece for part in attention.inputs for piece in _rows(model, prefix, part, num_groups)]
        slices += [Slice(prefix + path, 0, 0, per_group) for path in attention.per_head]
        yield _fed_by(model, "heads", layer, num_groups, slices, prefix + attention.output)
    if ffn and not ffn.stays(config, layer):
        channels = input_features(model.get_submodule(prefix + ffn.output))
        slices = [piece for part in ffn.inputs for piece in _rows(model, prefix, part, channels)]
        group = _fed_by(model, "channels", layer, channels, slices, prefix + ffn.output)
        yield replace(group, added=ffn.added(config))
    if experts and _has_module(model, prefix + experts.experts):  # some layers of a family may be dense
        paths = (prefix + experts.router, prefix + experts.experts)
        slices = [Slice(f"{p}.{n}", 0, 0, 1) for p in paths for n, _ in model.get_submodule(p).named_parameters()]
        num_experts, top_k = getattr(config, experts.count), getattr(config, experts.top_k)
        params = _params_per_unit(model, slices)
        yield UnitGroup("experts", layer, num_experts, tuple(slices), paths[1], 1, params, paths[0], top_k)


def _stack_heads(model: nn.Module, family: Family, stack: Stack) -> UnitGroup:
    """The heads of a stack: head h of every attention block of every layer, with its column of the shared bias."""
    heads, num = family.stack_heads, getattr(model.config, family.stack_heads.num_heads)
    layers = [f"{stack.path}.{index}." for index in range(stack.num)]
    blocks = [layer + block for layer in layers for block in heads.blocks]
    blocks = [block for block in blocks if _has_module(model, f"{block}.{heads.output}")]
    slices = [s for block in blocks for name in heads.inputs for s in _rows(model, "", Part(f"{block}.{name}"), num)]
    outputs = [f"{block}.{heads.output}" for block in blocks]
    width = input_features(model.get_submodule(outputs[0])) // num
    slices += [Slice(f"{output}.weight", 1, 0, width) for output in outputs]
    slices.append(Slice(layers[0] + heads.bias, 1, 0, 1))
    also = tuple((output, width) for output in outputs[1:])
    params = _params_per_unit(model, slices)
    return UnitGroup("heads", stack.first, num, tuple(slices), outputs[0], width, params, also_read_by=also)


def _filter_groups(model: nn.Module, family: Family) -> Iterator[UnitGroup]:
    device, side = next(model.parameters()).device, getattr(model.config, "image_size", 64)
    image = torch.zeros(2, model.config.num_channels, side, side, device=device)
    removable = [space for space in spaces(model, {"pixel_values": image}) if space.fixed is None and space.readers]
    for index, space in enumerate(removable):
        slices = tuple(Slice(tensor, dim, 0, width) for tensor, dim, width in space.slices)
        (output, width), *others = space.readers
        stored = [piece for piece in slices if piece.tensor in dict(model.named_parameters())]
        params = _params_per_unit(model, stored)
        yield UnitGroup("filters", index, space.num, slices, output, width, params, also_read_by=tuple(others))


def _hidden_group(model: nn.Module, family: Family, stacks: tuple[Stack, ...]) -> UnitGroup:
    residual, names = family.residual, {id(module): name for name, module in model.named_modules()}
    base, size = model.base_model, getattr(model.config, family.residual.size)
    layers = [f"{stack.path}.{index}." for stack in stacks for index in range(stack.num)]
    reads = [layer + path for layer in layers for path in residual.reads]
    writes = [layer + path for layer in layers for path in residual.writes]
    norms = [layer + path for layer in layers for path in residual.norms] + [
        names[id(base.get_submodule(residual.last_norm))]
    ]
    outside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not name.startswith(f"{model.base_model_prefix}.")
        and module.in_features == size
    ]
    slices = [
        Slice(f"{path}.weight", 1, 0, 1)
        for path in (*reads, *outside, names[id(base.get_submodule(residual.embedding))])
    ]
    slices += [Slice(f"{path}.weight", 0, 0, 1) for path in (*writes, *norms)]
    slices += [Slice(f"{path}.bias", 0, 0, 1) for path in writes if model.get_submodule(path).bias is not None]
    once = {id(model.get_parameter(piece.tensor)): piece for piece in slices}  # embedding and head may be one
    params, heads = _params_per_unit(model, once.values()), getattr(model.config, family.residual.num_heads)
    others = tuple((path, 1) for path in reads[1:])
    return UnitGroup("hidden", 0, size, tuple(slices), reads[0], 1, params, least=heads, also_read_by=others)


def _has_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _rows(model: nn.Module, prefix: str, part: Part, num_units: int) -> Iterator[Slice]:
    """Slices of a linear module's weight and bias that hold the output features of one part."""
    path, module = prefix + part.path, model.get_submodule(prefix + part.path)
    features = module.out_features if isinstance(module, nn.Linear) else module.weight.shape[1]
    shares = [getattr(model.config, s) for s in part.blocks] if isinstance(part.blocks, tuple) else [1] * part.blocks
    start, size = (features * share // sum(shares) for share in (sum(shares[: part.index]), shares[part.index]))
    width, rest = divmod(size, num_units)
    if rest:
        raise Refused(f"{path} has {size} output features, not a multiple of its {num_units} units")
    yield Slice(f"{path}.weight", int(isinstance(module, Conv1D)), start, width)
    if module.bias is not None:
        yield Slice(f"{path}.bias", 0, start, width)


def _fed_by(model: nn.Module, kind: str, layer: int, num_units: int, slices: list[Slice], output: str) -> UnitGroup:
    """A group whose units are blocks of consecutive input features of the linear module `output`."""
    module = model.get_submodule(output)
    width = input_features(module) // num_units
    slices = [*slices, Slice(f"{output}.weight", 1 - int(isinstance(module, Conv1D)), 0, width)]
    return UnitGroup(kind, layer, num_units, tuple(slices), output, width, _params_per_unit(model, slices))


def _params_per_unit(model: nn.Module, slices: Iterable[Slice]) -> int:
    shapes = {piece: model.get_parameter(piece.tensor).shape for piece in slices}
    return sum(piece.width * shape.numel() // shape[piece.dim] for piece, shape in shapes.items())
