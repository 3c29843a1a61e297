"""Write a model as a checkpoint that stock `from_pretrained` reads, one tensor at a time."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.pieces import tensors_of
from tinygn_dist.backends.wrappers import plain_class
from tinygn_dist.checkpoints.companions import Companions
from tinygn_dist.checkpoints.config_files import add_to_config, write_config_files
from tinygn_dist.checkpoints.formats.form import Form
from tinygn_dist.checkpoints.safetensors_io import Kind, ShardWriter, StoredTensors, Written
from tinygn_dist.checkpoints.unstored import apart_in, keep_apart
from tinygn_dist.errors import Refused, UserError


def write_checkpoint(
    folder: Path,
    model: nn.Module,
    form: Form,
    beside: Companions,
    max_shard_gib: float,
    backend: Backend,
) -> dict[str, Written]:
    """safetensors shards, config, generation config, and what lies beside the weights of the source.

    A collective; the main rank writes, and holds one whole tensor at a time. model: as the backend prepared it. form:
    dtypes, and what is stored as codes. Returns what was written, by name on disk, on the main rank.
    Raises UserError when the disk fills up while writing, Refused when the model's class has no place for a tensor or
    lacks one.
    """
    failure: Exception | None = None
    checkpoint: _Checkpoint | None = None
    for name, tensor in backend.full_tensors(model):  # to the end on every rank, whatever happens on the main one
        if not backend.is_main or failure is not None:
            continue
        try:
            checkpoint = checkpoint or _Checkpoint(folder, model, backend, form, max_shard_gib, beside)
            checkpoint.add(name, tensor)
        except Exception as error:
            failure = error
    if isinstance(failure, OSError | SafetensorError):
        reason = getattr(failure, "strerror", None) or failure
        free = shutil.disk_usage(folder).free
        raise UserError(f"writing {folder} failed: {reason}; {free:,} bytes are free")
    if failure is not None:
        raise failure
    return checkpoint.finish() if checkpoint else {}


def skeleton_of(bare: nn.Module) -> nn.Module:
    """A model of the plain class and config of a live one, on the meta device, tied as the live one is."""
    with torch.device("meta"):
        plain = plain_class(bare)._from_config(copy.deepcopy(bare.config))
        plain.tie_weights()
        return keep_apart(plain, apart_in(bare, plain))


def refuse_misfits(bare: nn.Module, plain: nn.Module, backend: Backend) -> None:
    """Refused when a stock load of the live model's tensors would drop one, miss one, or find another shape. plain: as
    `skeleton_of` makes it."""
    held = {name: backend.shape(tensor) for name, tensor in tensors_of(bare).items()}
    asked = plain.state_dict(keep_vars=True)
    what = type(plain).__name__
    extra = sorted(held.keys() - asked.keys())
    if extra:
        raise Refused(
            f"{what} has no place for {len(extra)} tensors of the model, such as {extra[0]}: no stock engine would "
            "load them; give the class a module for them, or take them out before saving"
        )
    for name, shape in held.items():
        if tuple(shape) != tuple(asked[name].shape):
            raise Refused(
                f"{name} has shape {tuple(shape)}, {what} asks for {tuple(asked[name].shape)} by its config; set the "
                "config to the model's sizes before saving"
            )
    filled = {id(asked[name]) for name in held}
    ignored = [re.compile(pattern) for pattern in getattr(plain, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = [name for name, tensor in asked.items() if id(tensor) not in filled]
    missing = [name for name in missing if not any(pattern.search(name) for pattern in ignored)]
    if missing:
        raise Refused(f"the model lacks {len(missing)} tensors that {what} loads, such as {missing[0]}")


class _Checkpoint:
    """A checkpoint that is being written. transformers stores some weights in other shapes than it runs (fused experts
    one by one): each tensor is converted alone, and those that can only be converted together wait for each other."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        backend: Backend,
        form: Form,
        max_shard_gib: float,
        beside: Companions,
    ) -> None:
        bare = backend.unwrap(model)
        plain = skeleton_of(bare)
        refuse_misfits(bare, plain, backend)
        self._bare, self._form, self._waiting = bare, form, {}
        state = {
            name: torch.empty(backend.shape(tensor), dtype=form.dtypes.get(name, tensor.dtype), device="meta")
            for name, tensor in tensors_of(bare).items()
        }
        stored = revert_weight_conversion(bare, dict(state))
        layout = {name: _kind(tensor) for name, tensor in stored.items()}
        assert form.codes.keys() <= layout.keys(), "a weight on its grid is stored under another name"
        alone = {name: self._converted({name: tensor}) for name, tensor in state.items()}
        self._together = {
            name for name, made in alone.items() if any(layout.get(n) != _kind(t) for n, t in made.items())
        }
        dtype = next((k.dtype for k in layout.values() if k.dtype.is_floating_point), bare.dtype)
        layout = {part: k for name, kind in layout.items() for part, k in form.kinds(name, kind).items()}
        self._carried = StoredTensors(beside.tensor_files) if beside.tensors else None
        self._beside = beside
        layout |= {name: self._carried.kind(name) for name in beside.tensors}
        beside.copy(folder)
        write_config_files(folder, bare, plain, dtype, beside)
        if codes := form.quantization_config():
            add_to_config(folder, {"quantization_config": codes})
        self._writer = ShardWriter(folder, layout, max_shard_gib * 1e9)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        assert tensor.numel() > 0, f"{name} would be written empty"
        tensor = tensor.cpu().to(self._form.dtypes.get(name, tensor.dtype))
        if name in self._together:
            self._waiting[name] = tensor
        else:
            self._write({name: tensor})

    def finish(self) -> dict[str, Written]:
        if self._waiting:
            self._write(self._waiting)
        for name in self._beside.tensors:
            self._writer.add(name, self._carried.whole(name), carried=True)
        return self._writer.finish()

    def _write(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._converted(state).items():
            for part, stored in self._form.encoded(name, tensor).items():
                self._writer.add(part, stored)

    def _converted(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return revert_weight_conversion(self._bare, state)


def _kind(tensor: torch.Tensor) -> Kind:
    return Kind(tuple(tensor.shape), tensor.dtype)
