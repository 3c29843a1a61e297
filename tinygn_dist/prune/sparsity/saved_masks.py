"""Masks as whole tensors in a checkpoint, which fit any number of ranks on any backend."""

from __future__ import annotations

from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints.run_checkpoint import Saved, SavedUnder, Writer, WriterUnder
from tinygn_dist.prune.sparsity.masks import Masks


def write_masks(
    writer: Writer | WriterUnder, masks: Masks, model: nn.Module, backend: Backend, kind: str = "mask"
) -> None:
    """Collectives; each mask is written by one rank."""
    owners = backend.owners_of([1.0] * len(masks.matrices))
    for (name, packed), owner in zip(masks.packed(model, backend), owners, strict=True):
        if owner == backend.rank:
            writer.add(f"{kind}|{name}", packed)


def read_masks(saved: Saved | SavedUnder, masks: Masks, model: nn.Module, backend: Backend, kind: str = "mask") -> None:
    for full in saved.names(f"{kind}|"):
        masks.unpack(full.removeprefix(f"{kind}|"), saved.tensor(full), model, backend)
