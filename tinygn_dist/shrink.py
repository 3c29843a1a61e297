"""Take removed units out for good: a smaller config and the tensors that go with it.

The smaller model is built from its config by its own class and filled strictly, so every attribute that a forward
relies on (head counts, layer indices) is right by construction, and a config that cannot express the cut fails here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

import torch
from transformers import PretrainedConfig

from tinygn_dist.anatomy import Anatomy, UnitGroup
from tinygn_dist.units import KeptUnits


def smaller_config(config: PretrainedConfig, anatomy: Anatomy, kept: KeptUnits) -> PretrainedConfig:
    """Copy of the config with the kept counts. Per-layer lists (such as layer_types) keep the kept layers' entries."""
    small, family, before = copy.deepcopy(config), anatomy.family, anatomy.num_layers
    for key, value in config.to_dict().items():
        if isinstance(value, list) and "layer" in key and len(value) == before:
            setattr(small, key, [value[layer] for layer in kept.layers])
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
    return small


def smaller_state(
    state: Mapping[str, torch.Tensor], anatomy: Anatomy, kept: KeptUnits, is_conv1d: Mapping[str, bool]
) -> dict[str, torch.Tensor]:
    """The state dict of the smaller model. state: full tensors by name. is_conv1d: module -> weight stored (in, out)."""
    rows: dict[str, list[torch.Tensor]] = {}
    columns: dict[str, torch.Tensor] = {}
    for group in anatomy.groups:
        units = kept.of(group.kind).get(group.layer)
        if units is not None:
            _slices_of(group, torch.tensor(units), state, is_conv1d, rows, columns)
    position = {layer: index for index, layer in enumerate(kept.layers)}
    pattern = re.compile(rf"^{re.escape(anatomy.layers_path)}\.(\d+)\.")
    small = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        is_weight = leaf == "weight"
        out_dim = int(is_weight and is_conv1d.get(module, False))
        if module in rows and leaf in ("weight", "bias"):
            tensor = tensor.index_select(out_dim, torch.cat(rows[module]).to(tensor.device))
        if module in columns and is_weight:
            tensor = tensor.index_select(1 - out_dim, columns[module].to(tensor.device))
        found = pattern.match(name)
        if found:
            if int(found.group(1)) not in position:
                continue
            name = f"{anatomy.layers_path}.{position[int(found.group(1))]}.{name[found.end() :]}"
        small[name] = tensor.contiguous()
    return small


def _slices_of(group: UnitGroup, units: torch.Tensor, state, is_conv1d, rows, columns) -> None:
    def expand(width: int) -> torch.Tensor:
        return (units[:, None] * width + torch.arange(width)).flatten()

    columns[group.output] = expand(group.output_width)
    for row in group.inputs:
        weight = state[row.part.path + ".weight"]
        features = weight.shape[1] if is_conv1d.get(row.part.path, False) else weight.shape[0]
        offset = row.part.index * (features // row.part.of)
        rows.setdefault(row.part.path, []).append(offset + expand(row.width))
