"""Take removed units out for good: a smaller config and the tensors that go with it.

The smaller model is built from its config by its own class and filled strictly, so every attribute that a forward
relies on (head counts, layer indices) is right by construction, and a config that cannot express the cut fails here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig

from tinygn_dist.anatomy import Anatomy, Slice
from tinygn_dist.backends.base import Backend
from tinygn_dist.units import KeptUnits


def smaller_config(config: PretrainedConfig, anatomy: Anatomy, kept: KeptUnits) -> PretrainedConfig:
    """Copy of the config with the kept counts. Per-layer lists (such as layer_types) keep the kept layers' entries."""
    small, family, before = copy.deepcopy(config), anatomy.family, anatomy.num_layers
    for key, value in config.to_dict().items():
        if isinstance(value, list) and "layer" in key and len(value) == before:
            setattr(small, key, [value[layer] for layer in kept.layers])
    if family.filters:
        family.filters.resize(small, _widths(anatomy, kept))
        return small
    setattr(small, family.depth, len(kept.layers))
    if kept.heads:
        attention = family.attention
        groups = len(next(iter(kept.heads.values())))
        heads, kv_heads = getattr(config, attention.num_heads), getattr(config, attention.num_kv_heads)
        small.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        setattr(small, attention.num_heads, heads // kv_heads * groups)
        setattr(small, attention.num_kv_heads, groups)
    if kept.channels:
        setattr(small, family.feed_forward.width, len(next(iter(kept.channels.values()))))
    if kept.experts:
        setattr(small, family.experts.count, len(next(iter(kept.experts.values()))))
    return small


def smaller_state(state: Mapping[str, torch.Tensor], anatomy: Anatomy, kept: KeptUnits) -> dict[str, torch.Tensor]:
    """The state dict of the smaller model. state: full tensors by name."""
    keep: dict[tuple[str, int], torch.Tensor] = {}
    for group in anatomy.groups:
        units = kept.of(group.kind).get(group.layer)
        if units is not None:
            gone = sorted(set(range(group.num_units)) - set(units))
            for piece in group.slices:
                size = state[piece.tensor].shape[piece.dim]
                mask = keep.setdefault((piece.tensor, piece.dim), torch.ones(size, dtype=torch.bool))
                mask[_entries(piece, gone)] = False
    position = {layer: index for index, layer in enumerate(kept.layers)}
    pattern = re.compile(rf"^{re.escape(anatomy.layers_path)}\.(\d+)\.")
    small = {}
    for name, tensor in state.items():
        for dim in range(tensor.dim()):
            if (name, dim) in keep:
                tensor = tensor.index_select(dim, keep[name, dim].nonzero().squeeze(1).to(tensor.device))
        found = pattern.match(name)
        if found:
            if int(found.group(1)) not in position:
                continue
            name = f"{anatomy.layers_path}.{position[int(found.group(1))]}.{name[found.end() :]}"
        small[name] = tensor.contiguous()
    return small


def fill_smaller(small: nn.Module, dense: nn.Module, anatomy: Anatomy, kept: KeptUnits, backend: Backend) -> nn.Module:
    """`small`, built from `smaller_config`, with the kept weights of the prepared `dense` model; in eval mode, not yet
    prepared. A collective: the main rank fills, the others take its weights."""
    state = backend.full_state(dense)
    with backend.together("filling the smaller model"):
        if backend.is_main:
            small.load_state_dict(smaller_state(state, anatomy, kept), strict=True)
    backend.spread(small)
    small.tie_weights()
    small.generation_config = getattr(backend.unwrap(dense), "generation_config", None)
    return small.eval()


def _widths(anatomy: Anatomy, kept: KeptUnits) -> Callable[[str], int]:
    """Outputs that a module of a convolutional net keeps, by its path."""
    left = {
        piece.tensor: len(kept.filters[group.layer])
        for group in anatomy.of_kind("filters")
        for piece in group.slices
        if piece.dim == 0
    }
    return lambda module: left.get(f"{module}.weight", anatomy.shapes[f"{module}.weight"][0])


def _entries(piece: Slice, units: Sequence[int]) -> torch.Tensor:
    """Positions along the slice's dim that belong to these units."""
    first = piece.start + torch.tensor(units, dtype=torch.int64)[:, None] * piece.width
    return (first + torch.arange(piece.width)).flatten()
