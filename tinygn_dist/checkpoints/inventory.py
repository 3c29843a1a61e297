"""Every stored tensor of a checkpoint is accounted for, from the names in its files and before any weight is read.

It has a place in the model, comes along as it is, is named in a note, or is refused.

The loader drops what the class has no module for. An export would then lack it while config.json still promises it:
value heads, layers that predict further tokens, scales of a format that config.json does not name.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from tinygn_dist.checkpoints import load
from tinygn_dist.checkpoints.companions import Companions, companions_of
from tinygn_dist.errors import Refused, UserError
from tinygn_dist.models.anatomy import Anatomy

_OF_A_FORMAT = re.compile(
    r"(^|[._])(weight_scale(_inv|_2)?|input_scale|scales|qweight|qzeros|g_idx|absmax|quant_map|nested_absmax|SCB|"
    r"weight_packed|weight_shape|weight_zero_point|quant_state(\..*)?|weight_format)$"
)
_ROTARY = r"rotary_emb\.inv_freq$"
"""stored by old versions of every class that has it"""
_FLOATS = ("F64", "F32", "F16", "BF16")
_PREDICTION = re.compile(r"(^|\.)(mtp|mtp_layers|nextn)(\.|$)")


@dataclass(frozen=True)
class Inventory:
    """Stored names without a place in the model. recomputed: by the class itself. prediction: of layers that predict
    further tokens. other: heads and modules of another class."""

    recomputed: tuple[str, ...] = ()
    prediction: tuple[str, ...] = ()
    other: tuple[str, ...] = ()


def take_inventory(source: load.Source, skeleton: nn.Module) -> Inventory:
    """What the files of a checkpoint hold beside the model. skeleton: of its class and config.

    Raises UserError when weights are missing, Refused when some are in a format that config.json does not name. Empty
    for GGUF files, which transformers translates.
    """
    dtypes = stored_dtypes(source)
    if not dtypes:
        return Inventory()
    places, complete = _places(skeleton, dtypes)
    _refuse_unnamed_formats(source, dtypes, places)
    state = skeleton.state_dict(keep_vars=True)
    found = {id(state[name]) for name in places.values() if name in state}
    optional = [re.compile(p) for p in getattr(skeleton, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = [name for name, tensor in state.items() if id(tensor) not in found]
    missing = [name for name in missing if not any(pattern.search(name) for pattern in optional)]
    if missing and complete:
        raise UserError(
            f"{source.options.name} lacks {len(missing)} weights of {type(skeleton).__name__}, such as "
            f"{sorted(missing)[0]}; set model.task to what the checkpoint was trained for"
        )
    ignored = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
    by_design = [re.compile(pattern) for pattern in (*ignored, _ROTARY)]
    buffers = {name for name, _ in skeleton.named_buffers()}
    kinds: dict[str, list[str]] = {"recomputed": [], "prediction": [], "other": []}
    for key, name in places.items():
        if name in state:
            continue
        if _PREDICTION.search(key) or _beyond_the_last_layer(key, source):
            kinds["prediction"].append(key)
        elif name in buffers or any(pattern.search(name) for pattern in by_design):
            kinds["recomputed"].append(key)
        else:
            kinds["other"].append(key)
    return Inventory(**{kind: tuple(sorted(keys)) for kind, keys in kinds.items()})


def beside(source: load.Source, skeleton: nn.Module, anatomy: Anatomy, removes_units: bool) -> Companions:
    """All that comes along with a checkpoint's model: files, and stored tensors that still fit. Raises as
    `take_inventory` and `companions_of` do."""
    if source.gguf_file:
        return Companions()
    found = companions_of(source.path, source.options.revision)
    inventory = take_inventory(source, skeleton) if source.is_local else Inventory()
    files = tuple(load.safetensors_files(source)) if source.is_local else ()
    extra = (*inventory.prediction, *inventory.other)
    fits = [
        key
        for key in extra
        if files and not (removes_units and (key in inventory.prediction or anatomy.layer_of(key) is not None))
    ]
    dropped = [key for key in extra if key not in fits]
    promises = tuple(_promises(source)) if set(dropped) & set(inventory.prediction) else ()
    return replace(found, tensors=tuple(fits), tensor_files=files, dropped=tuple(dropped), broken_promises=promises)


def stored_dtypes(source: load.Source) -> Mapping[str, str]:
    """{name: dtype in the words of safetensors, or nothing where only the name is known} of what the files hold."""
    if source.gguf_file:
        return {}
    try:
        stored = load.stored_tensors(source)
        if stored is not None:
            return stored.dtypes
    except (OSError, SafetensorError) as error:
        raise UserError(f"model {source.options.name} cannot be loaded: {error}") from None
    folder = Path(source.path)
    with contextlib.suppress(OSError, ValueError, KeyError):
        index = json.loads((folder / "pytorch_model.bin.index.json").read_text(encoding="utf-8"))
        return dict.fromkeys(index["weight_map"], "")
    file = folder / "pytorch_model.bin"
    return dict.fromkeys(torch.load(file, map_location="meta", weights_only=True), "") if file.is_file() else {}


def _places(model: nn.Module, keys: Iterable[str]) -> tuple[dict[str, str], bool]:
    """{stored name: name in the model that the loader looks for}, and whether that tells of every tensor of the model:
    a stored tensor that is split into several is named by the first."""
    state = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    splitting = {p for c in converters if len(c.target_patterns) > 1 for p in c.source_patterns}
    places, complete = {}, True
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name = key
        places[key], complete = name, complete and pattern not in splitting
    return places, complete


def _refuse_unnamed_formats(source: load.Source, dtypes: Mapping[str, str], places: Mapping[str, str]) -> None:
    """A checkpoint that is quantised and does not say so: what is loaded would be codes taken for weights."""
    for key, dtype in dtypes.items():
        packed = key.endswith("weight") and dtype and dtype not in _FLOATS
        if packed or _OF_A_FORMAT.search(key):
            what = f"is stored as {dtype}" if packed else "belongs to a quantised format"
            raise Refused(
                f"{source.options.name}: {key} {what}, and config.json names none: codes cannot be scored as weights; "
                "compress the original checkpoint and quantise the result"
            )


def _beyond_the_last_layer(key: str, source: load.Source) -> bool:
    config = source.config.get_text_config()
    number = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    layers = getattr(config, "num_hidden_layers", None)
    return bool(number and layers and int(number[1]) >= layers)


def _promises(source: load.Source) -> Iterable[str]:
    """The entries of the config that count layers which predict further tokens."""
    for name in ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"):
        if getattr(source.config.get_text_config(), name, None):
            yield name
