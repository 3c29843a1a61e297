"""Write a model as a checkpoint that stock `from_pretrained` reads, one tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.pieces import tensors_of
from tinygn_dist.checkpoints.safetensors_io import Kind, ShardWriter, Written
from tinygn_dist.errors import UserError


def write_checkpoint(
    folder: Path,
    model: nn.Module,
    dtypes: Mapping[str, torch.dtype],
    processor: Any,
    max_shard_gib: float,
    backend: Backend,
) -> dict[str, Written]:
    """safetensors shards, config, generation config, tokenizer and custom code, as plain `from_pretrained` reads them.

    A collective; the main rank writes, and holds one whole tensor at a time. model: as the backend prepared it. dtypes:
    of the tensors to write, by name; others keep theirs. Returns what was written, by name on disk, on the main rank.
    Raises UserError when the disk fills up while writing.
    """
    failure: Exception | None = None
    checkpoint: _Checkpoint | None = None
    for name, tensor in backend.full_tensors(model):  # to the end on every rank, whatever happens on the main one
        if not backend.is_main or failure is not None:
            continue
        try:
            checkpoint = checkpoint or _Checkpoint(folder, model, backend, dtypes, processor, max_shard_gib)
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


class _Checkpoint:
    """A checkpoint that is being written. transformers stores some weights in other shapes than it runs (fused experts
    one by one): each tensor is converted alone, and those that can only be converted together wait for each other."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        backend: Backend,
        dtypes: Mapping[str, torch.dtype],
        processor: Any,
        max_shard_gib: float,
    ) -> None:
        bare = backend.unwrap(model)
        self._bare, self._dtypes, self._waiting = bare, dtypes, {}
        state = {
            name: torch.empty(backend.shape(tensor), dtype=dtypes.get(name, tensor.dtype), device="meta")
            for name, tensor in tensors_of(bare).items()
        }
        stored = revert_weight_conversion(bare, dict(state))
        layout = {name: _kind(tensor) for name, tensor in stored.items()}
        alone = {name: self._converted({name: tensor}) for name, tensor in state.items()}
        self._together = {
            name for name, made in alone.items() if any(layout.get(n) != _kind(t) for n, t in made.items())
        }
        bare.save_pretrained(folder, state_dict={})  # all but the weights
        bare.config.dtype = next((k.dtype for k in layout.values() if k.dtype.is_floating_point), bare.dtype)
        bare.config.save_pretrained(folder)  # again: the running model may be in another dtype
        processor.save_pretrained(folder)
        self._writer = ShardWriter(folder, layout, max_shard_gib * 1e9)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        assert tensor.numel() > 0, f"{name} would be written empty"
        tensor = tensor.cpu().to(self._dtypes.get(name, tensor.dtype))
        if name in self._together:
            self._waiting[name] = tensor
        else:
            self._write({name: tensor})

    def finish(self) -> dict[str, Written]:
        if self._waiting:
            self._write(self._waiting)
        return self._writer.finish()

    def _write(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._converted(state).items():
            self._writer.add(name, tensor)

    def _converted(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return revert_weight_conversion(self._bare, state)


def _kind(tensor: torch.Tensor) -> Kind:
    return Kind(tuple(tensor.shape), tensor.dtype)
