"""Take removed units out for good: a smaller config and the tensors that go with it.

The smaller model is built from its config by its own class and filled strictly, so every attribute that a forward
relies on (head counts, layer indices) is right by construction, and a config that cannot express the cut fails here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn
from transformers import PretrainedConfig

from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.pieces import Origin, Run, filled, hollow, tensors_of
from tinygn_dist.models.anatomy import Anatomy, Slice
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.models.stacks import keep_layers


def smaller_config(config: PretrainedConfig, anatomy: Anatomy, kept: KeptUnits) -> PretrainedConfig:
    """Copy of the config with the kept counts. Per-layer lists (such as layer_types) keep the kept layers' entries."""
    small, family = copy.deepcopy(config), anatomy.family
    if family.filters:
        family.filters.resize(small, _widths(anatomy, kept))
        return small
    keep_layers(small, anatomy.stacks, kept.layers)
    if kept.heads:
        (family.attention or family.stack_heads).resize(small, len(next(iter(kept.heads.values()))))
    if kept.channels:
        _write_widths(small, config, anatomy, kept)
    if kept.hidden:
        residual, full, left = family.residual, anatomy.hidden.num_units, len(kept.hidden[0])
        small.head_dim = getattr(config, "head_dim", None) or full // getattr(config, residual.num_heads)
        setattr(small, residual.size, left)
        setattr(small, residual.eps, getattr(config, residual.eps) * full / left)
    if kept.experts:
        setattr(small, family.experts.count, len(next(iter(kept.experts.values()))))
    return small


def norm_scales(anatomy: Anatomy, kept: KeptUnits) -> dict[str, float]:
    """By which the weights of norms grow when the mean square is over fewer dimensions, by the dense model's names."""
    if not kept.hidden:
        return {}
    scale = (anatomy.hidden.num_units / len(kept.hidden[0])) ** 0.5
    ends = tuple(f"{name}.weight" for name in (*anatomy.family.residual.norms, anatomy.family.residual.last_norm))
    return {piece.tensor: scale for piece in anatomy.hidden.slices if piece.tensor.endswith(ends)}


class Cut:
    """Which entries of a dense model's tensors a smaller model keeps, and under which names."""

    def __init__(self, anatomy: Anatomy, kept: KeptUnits, shapes: Mapping[str, Sequence[int]]) -> None:
        """shapes: of the dense model's tensors, by name."""
        self._keep: dict[tuple[str, int], torch.Tensor] = {}
        for group in (*anatomy.groups, *filter(None, [anatomy.hidden])):
            units = kept.of(group.kind).get(group.layer)
            if units is not None:
                gone = sorted(set(range(group.num_units)) - set(units))
                for piece in group.slices:
                    mask = torch.ones(shapes[piece.tensor][piece.dim], dtype=torch.bool)
                    self._keep.setdefault((piece.tensor, piece.dim), mask)[_entries(piece, gone)] = False
        self._old = {  # path of a layer of the smaller model -> of the dense one
            f"{stack.path}.{place}": anatomy.path_of(layer)
            for stack in anatomy.stacks
            for place, layer in enumerate(stack.kept(kept.layers))
        }

    def source(self, name: str) -> str:
        """The name in the dense model of a tensor of the smaller one."""
        words = name.split(".")
        for end in range(len(words), 0, -1):
            if old := self._old.get(".".join(words[:end])):
                return ".".join([old, *words[end:]])
        return name

    def of(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What is left of a dense tensor, named as in the dense model."""
        for dim in range(whole.dim()):
            if (name, dim) in self._keep:
                whole = whole.index_select(dim, self._keep[name, dim].nonzero().squeeze(1).to(whole.device))
        return whole


def smaller_origin(
    build: Callable[[], nn.Module],
    dense: nn.Module,
    anatomy: Anatomy,
    kept: KeptUnits,
    backend: Backend,
    shifts: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Origin:
    """The smaller model, to be placed by the backend, with the kept weights of the prepared `dense` one. build: makes
    it from `smaller_config`. shifts: added to the dense one's tensors of these names. Placing it is a collective: one
    dense tensor at a time is whole on a rank."""
    bare = backend.unwrap(dense)
    shapes = {name: backend.shape(t) for name, t in bare.state_dict(keep_vars=True).items()}
    cut, scales = Cut(anatomy, kept, shapes), norm_scales(anatomy, kept)

    def run(name: str, low: int, high: int) -> torch.Tensor:
        source = cut.source(name)
        whole = backend.whole(dense, source)
        if source in scales:
            whole = whole * scales[source]
        if source in shifts:
            whole = whole + shifts[source].to(whole)
        return cut.of(source, whole).reshape(-1)[low:high]

    def empty() -> tuple[nn.Module, Run]:
        small = hollow(build)
        small.generation_config = getattr(bare, "generation_config", None)
        return small, run

    return Origin(lambda: filled(*empty()), empty)


def in_dtypes(
    build: Callable[[], nn.Module], anatomy: Anatomy, kept: KeptUnits, dtypes: Mapping[str, torch.dtype]
) -> Callable[[], nn.Module]:
    """`build` of a smaller model, with every tensor in the dtype that it has in the dense one: classes keep some in
    fp32 whatever the others are (T5's `wo`), and only loading does so. dtypes: by the dense model's names."""
    names = Cut(anatomy, KeptUnits(kept.layers), {})

    def built() -> nn.Module:
        model = build()
        for name, tensor in tensors_of(model).items():
            dtype = dtypes.get(names.source(name), tensor.dtype)
            if dtype != tensor.dtype:
                tensor.data = tensor.data.to(dtype)
        return model

    return built


def _widths(anatomy: Anatomy, kept: KeptUnits) -> Callable[[str], int]:
    """Outputs that a module of a convolutional net keeps, by its path."""
    left = {
        piece.tensor: len(kept.filters[group.layer])
        for group in anatomy.of_kind("filters")
        for piece in group.slices
        if piece.dim == 0
    }
    return lambda module: left.get(f"{module}.weight", anatomy.shapes[f"{module}.weight"][0])


def _write_widths(small: PretrainedConfig, config: PretrainedConfig, anatomy: Anatomy, kept: KeptUnits) -> None:
    """Channels that are left, into the entries of the config: one of all layers, a list of each, or one of each
    stack."""
    ffn, left = anatomy.family.feed_forwards[0], {layer: len(units) for layer, units in kept.channels.items()}
    if ffn.uneven == "layers":
        full = getattr(config, ffn.width)
        setattr(small, ffn.width, [left.get(layer, full[layer]) for layer in kept.layers])
        return
    entries = (ffn.width,) if isinstance(ffn.width, str) else ffn.width
    for entry, stack in zip(entries, anatomy.stacks, strict=False):  # one entry may serve all stacks
        setattr(small, entry, next(width for layer, width in left.items() if layer in stack.layers))


def _entries(piece: Slice, units: Sequence[int]) -> torch.Tensor:
    """Positions along the slice's dim that belong to these units."""
    first = piece.start + torch.tensor(units, dtype=torch.int64)[:, None] * piece.width
    return (first + torch.arange(piece.width)).flatten()
