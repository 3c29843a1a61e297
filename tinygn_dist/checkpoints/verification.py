"""Read a written checkpoint back: its bits are those that were written, the report's sizes and zeros are its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints.safetensors_io import StoredTensors, Written, written
from tinygn_dist.models.anatomy import Matrix


@dataclass(frozen=True)
class Disk:
    """What the safetensors files hold of the model. num_params: distinct stored values. zeros, sizes: per tensor.
    matrices: the names of those that are matrices or stacks of them."""

    bytes: int
    num_params: int
    zeros: dict[str, int]
    sizes: dict[str, int]
    matrices: tuple[str, ...]


def read_back(folder: Path, expected: Mapping[str, Written]) -> Disk:
    """Read every stored tensor and compare its bits with what was written. expected: as `write_checkpoint` returned it;
    empty on ranks that did not write, which only look at what is there. Raises RuntimeError when a tensor differs."""
    files = sorted(folder.glob("*.safetensors"))
    stored, found = StoredTensors(files), {}
    for name in stored.names:
        found[name] = written(name, stored.whole(name)) if expected else None
    if expected and found != dict(expected):
        name = next(n for n in {**expected, **found} if found.get(n) != expected.get(n))
        raise RuntimeError(f"{folder} holds another {name} than was written; the disk or library is at fault")
    facts = [(name, fact) for name, fact in found.items() if fact and not expected[name].carried]
    return Disk(
        sum(file.stat().st_size for file in files),
        sum(fact.size for _, fact in facts),
        {name: fact.zeros for name, fact in facts},
        {name: fact.size for name, fact in facts},
        tuple(name for name, fact in facts if fact.is_matrix),
    )


def digests(model: nn.Module, dtypes: Mapping[str, torch.dtype], backend: Backend) -> dict[str, bytes]:
    """SHA-256 of this rank's piece of every tensor, in the dtype it is written in: two models that are not in memory
    together are compared by these."""
    return {
        name: hashlib.sha256(_bytes_of(piece.to(dtypes.get(name, piece.dtype)))).digest()
        for name, piece in backend.pieces(model).items()
    }


def _bytes_of(piece: torch.Tensor) -> memoryview:
    return memoryview(piece.contiguous().cpu().view(torch.uint8).numpy())


def check_reloaded(
    reloaded: nn.Module, written: Mapping[str, bytes], dtypes: Mapping[str, torch.dtype], backend: Backend
) -> None:
    """Compare the model that was loaded from the files with the `digests` of the one that was written, each rank its
    pieces. Raises RuntimeError on the ranks where they differ."""
    for name, digest in digests(reloaded, dtypes, backend).items():
        if digest != written[name]:
            raise RuntimeError(f"{name} was reloaded with other values than were written; the library is at fault")


def sparsity_figures(
    disk: Disk, matrices: tuple[Matrix, ...], reloaded: nn.Module, backend: Backend
) -> dict[str, float | int]:
    """Zeros among the masked weights (in the model that was loaded from disk), all matrices and everything stored. A
    collective."""
    nonzero = torch.zeros(1, dtype=torch.int64)
    for matrix in matrices:
        nonzero += int(torch.count_nonzero(backend.shard(reloaded, matrix).weight))
    left, targeted = int(backend.sum_over_shards(nonzero)), sum(matrix.numel for matrix in matrices)

    def share(chosen: list[str]) -> float:
        total = sum(disk.sizes[name] for name in chosen)
        return sum(disk.zeros[name] for name in chosen) / total if total else 0.0

    return {
        "targeted_weights": 1 - left / targeted if targeted else 0.0,
        "all_weight_matrices": share(list(disk.matrices)),
        "whole_checkpoint": share(list(disk.sizes)),
        "zeros": sum(disk.zeros.values()),
    }
