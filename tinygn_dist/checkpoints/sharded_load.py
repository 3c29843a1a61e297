"""Where the weights of a model come from before it is spread over the ranks: a checkpoint, or a larger model.

A backend that shards weights builds the model empty and fills in this rank's pieces, so no rank ever holds all of it.
Files that cannot be read piece by piece (GGUF, pickled weights) are read whole by the main rank alone, which hands
them out one tensor at a time: while it loads, that rank, and no other, needs room for one whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.pieces import Origin, filled, hollow, tensors_of
from tinygn_dist.checkpoints import load
from tinygn_dist.checkpoints.generation import read_generation_config
from tinygn_dist.checkpoints.safetensors_io import Kind, StoredTensors
from tinygn_dist.checkpoints.unstored import set_unstored_buffers
from tinygn_dist.errors import UserError


def placed(source: load.Source, backend: Backend) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """The model of a checkpoint as the backend spreads it, and the dtypes its tensors have on disk. A collective;
    raises UserError on every rank when a weight is missing, unreadable, or holds NaN or inf."""
    origin = from_checkpoint(source, backend)
    model = backend.place(origin)
    with backend.together("checking the weights"):
        load.refuse_nonfinite(backend.pieces(model))
    return model, origin.dtypes


def from_checkpoint(source: load.Source, backend: Backend) -> Origin:
    """The model of a checkpoint. Every rank calls this; what it raises is for `backend.together` to tell."""

    def whole() -> nn.Module:
        if source.codes is not None:
            return _dequantised(source, backend)
        if source.is_local:
            return load.load_model(source)
        return backend.main_first(lambda: load.load_model(source))

    def empty() -> tuple[nn.Module, Any]:
        with backend.together("looking into the checkpoint"):
            stored = _open(source, backend)
            dtype = None if stored is None else load.asked_dtype(source) or _dtype_of(stored)
            model = None if stored is None else _empty(source, dtype)
            recipes = None if model is None else _recipes(model, stored)
        if not all(backend.everyone(recipes is not None)):
            return _from_main(source, backend)
        return model, lambda name, low, high: recipes[name](low, high)

    return Origin(whole, empty)


def _dequantised(source: load.Source, backend: Backend) -> nn.Module:
    """A quantised checkpoint's model with the weights that its codes stand for."""
    stored = _open(source, backend)
    model = _empty(source, load.asked_dtype(source) or _dtype_of(stored))
    recipes = _recipes(model, stored)
    if recipes is None:
        raise UserError(
            f"{source.options.name}: its codes do not make all weights of {type(model).__name__}; use the model "
            "it was made from"
        )
    return filled(model, lambda name, low, high: recipes[name](low, high))


def _open(source: load.Source, backend: Backend) -> StoredTensors | None:
    """The checkpoint's safetensors files; None where it has none."""
    if source.gguf_file:
        return None
    if source.is_local:
        return load.stored_tensors(source)
    return backend.main_first(lambda: load.stored_tensors(source))


def _empty(source: load.Source, dtype: torch.dtype) -> nn.Module:
    def build() -> nn.Module:
        return load.rebuild(source, source.config, dtype)

    model = hollow(build)
    set_unstored_buffers(model, build)
    read_generation_config(model, source.path, source.options.revision)
    return model


def _dtype_of(stored: StoredTensors) -> torch.dtype:
    """What `from_pretrained` takes where nothing says it: the dtype of the first weights."""
    kinds = (stored.kind(name).dtype for name in stored.names)
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


def _recipes(model: nn.Module, stored: StoredTensors) -> Mapping[str, Any] | None:
    """For each tensor of the model, how a flat run of it is read; None when some tensor cannot be made of stored ones.

    Names are translated as transformers does, and fused weights (experts) are made of their parts, one at a time.
    """
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return None  # dtypes that `from_pretrained` decides
    state = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parts: dict[str, list[tuple[str, str | None]]] = {}
    for key in sorted(stored.names, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        parts.setdefault(name, []).append((key, pattern))
    stored_as = {id(state[name]): name for name in parts if name in state}  # tied weights lie under one of their names
    recipes = {}
    for name, tensor in tensors_of(model).items():
        if id(tensor) not in stored_as:
            return None
        known = stored_as[id(tensor)]
        keys = parts[known]
        if keys[0][1] is None:
            if stored.kind(keys[0][0]).shape != tuple(tensor.shape):
                return None
            recipes[name] = lambda low, high, key=keys[0][0]: stored.run(key, low, high)
        else:
            recipes[name] = _converted(model, stored, known, keys, by_pattern[keys[0][1]])
    return recipes


def _converted(
    model: nn.Module, stored: StoredTensors, name: str, keys: list[tuple[str, str]], converter: WeightConverter
):
    """Reads all that a fused tensor is made of, joins it, and keeps the run that was asked for."""

    def run(low: int, high: int) -> torch.Tensor:
        if high <= low:
            return torch.empty(0)
        own = copy.deepcopy(converter)
        for key, pattern in keys:
            own.add_tensor(name, key, pattern, lambda key=key: stored.whole(key))
        made = own.convert(name, model=model, config=model.config)[name]
        return (made[0] if isinstance(made, list) else made).reshape(-1)[low:high]

    return run


def _natural(key: str) -> list[tuple[int, Any]]:
    """Experts in the order of their numbers."""
    return [(0, int(word)) if word.isdigit() else (1, word) for word in key.split(".")]


def _from_main(source: load.Source, backend: Backend) -> tuple[nn.Module, Any]:
    state: dict[str, torch.Tensor] = {}
    with backend.together("loading the model on the main rank"):
        if backend.is_main:
            model = load.load_model(source)
            dtype, state = model.dtype, {n: t.detach() for n, t in tensors_of(model).items()}
            del model
    dtype = backend.everyone(dtype if backend.is_main else None)[0]
    model = _empty(source, dtype)
    kinds = {name: Kind(tuple(t.shape), t.dtype) for name, t in tensors_of(model).items()}
    dtypes = backend.everyone({name: t.dtype for name, t in state.items()})[0]

    def run(name: str, low: int, high: int) -> torch.Tensor:
        whole = backend.from_main(state.pop(name, None), kinds[name].shape, dtypes[name])
        return whole.reshape(-1)[low:high]

    return model, run
