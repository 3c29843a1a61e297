"""The units of a model: which slices of tensors go with each. Reads module structure only, so it works on the meta
device."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tinygn_dist.errors import Refused
from tinygn_dist.models.channel_graph import spaces
from tinygn_dist.models.families import fixed_units
from tinygn_dist.models.family_schema import Family, Part
from tinygn_dist.models.matrices import input_features
from tinygn_dist.models.stacks import Stack, keep_layers


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
    further modules that read the units, with their features per unit (filters; `layer` then only numbers the groups).
    router: the module that chooses between the units, if any. least: how many have to stay. added: whether `output` is
    known to write straight to the residual stream (`FeedForward.added`).
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
    counts: tuple[int, ...] = ()
    """how many units the class can be built with, all of them included; empty where any number will do"""

    def accepts(self, count: int) -> bool:
        """Whether so many units may stay."""
        return not self.counts or count in self.counts

    @property
    def readers(self) -> tuple[tuple[str, int], ...]:
        """(module, input features per unit) of every module that reads the units."""
        return ((self.output, self.output_width), *self.also_read_by)


def unit_groups(model: nn.Module, family: Family, stacks: tuple[Stack, ...]) -> Iterator[UnitGroup]:
    """Of every kind that the family describes, in layer order."""
    may_lose_heads = family.attention and "heads" not in fixed_units(family, model.config)
    counts = _head_counts(model, family, stacks) if may_lose_heads else ()
    for stack in stacks:
        if family.stack_heads:
            yield _stack_heads(model, family, stack)
        for index in range(stack.num):
            yield from _unit_groups(model, family, stack.first + index, f"{stack.path}.{index}.", counts)
    if family.filters:
        yield from _filter_groups(model, family)


def _head_counts(model: nn.Module, family: Family, stacks: tuple[Stack, ...]) -> tuple[int, ...]:
    """How many KV groups a model of this class can have: configs check them against other sizes (Llama and Gemma 2 want
    the hidden size to be a multiple of the number of heads). Found by building one layer of each on the meta device."""
    full = getattr(model.config, family.attention.num_kv_heads)
    return tuple(count for count in range(1, full + 1) if count == full or _can_have(model, family, stacks, count))


def _can_have(model: nn.Module, family: Family, stacks: tuple[Stack, ...], num_groups: int) -> bool:
    config = copy.deepcopy(model.config)
    keep_layers(config, stacks, [0])
    family.attention.resize(config, num_groups)
    try:
        config.validate()
        with torch.device("meta"):
            type(model)(config)
    except Exception:  # whatever a class raises
        return False
    return True


def _unit_groups(
    model: nn.Module, family: Family, layer: int, prefix: str, head_counts: tuple[int, ...]
) -> Iterator[UnitGroup]:
    config, attention, experts = model.config, family.attention, family.experts
    ffn = next((f for f in family.feed_forwards if all(_has_module(model, prefix + p.path) for p in f.inputs)), None)
    if attention and "heads" not in fixed_units(family, config):
        num_groups = getattr(config, attention.num_kv_heads)
        per_group = getattr(config, attention.num_heads) // num_groups
        slices = [piece for part in attention.inputs for piece in _rows(model, prefix, part, num_groups)]
        slices += [Slice(prefix + path, 0, 0, per_group) for path in attention.per_head]
        group = _fed_by(model, "heads", layer, num_groups, slices, prefix + attention.output)
        yield replace(group, counts=head_counts)
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


def hidden_group(model: nn.Module, family: Family, stacks: tuple[Stack, ...]) -> UnitGroup:
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
