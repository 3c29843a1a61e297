"""A parameter cut into equal runs of its flat elements, one per rank; the last ones may be short or empty.

Both FSDP2 (whole rows) and ZeRO-3 (any flat run) cut weights like this, so gathering, cutting and summing a weight
over its owners is the same code for both; and so is dealing work to ranks that must run equally many forwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")
_reduce_scatter = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)  # its name before torch 2.13


@dataclass(frozen=True)
class Slices:
    """How one tensor, lying somewhere in a parameter, is spread over the ranks that hold the parameter once.

    shape: of the tensor as stored. start: flat index in the parameter of its first element. length: elements of the
    parameter per rank. rank, num_ranks: within `group`.
    """

    shape: tuple[int, ...]
    start: int
    length: int
    rank: int
    num_ranks: int
    group: dist.ProcessGroup | None = None

    def bounds(self, rank: int | None = None) -> tuple[int, int]:
        """First and last + 1 flat element of the tensor that a rank (this one by default) holds; equal for none."""
        rank, numel = self.rank if rank is None else rank, math.prod(self.shape)
        low, high = (min(max(r * self.length - self.start, 0), numel) for r in (rank, rank + 1))
        return low, high

    def local(self, run: torch.Tensor) -> torch.Tensor:
        """View of this rank's piece of the tensor in its flat run of the parameter."""
        low, high = self.bounds()
        before = self.start - self.rank * self.length
        return run[before + low : before + high] if high > low else run[:0]

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Flat copy of this rank's piece of a whole tensor, which may be dropped afterwards."""
        low, high = self.bounds()
        return whole.reshape(-1)[low:high].clone()

    def gather(self, piece: torch.Tensor) -> torch.Tensor:
        """The whole tensor, shaped as stored, from every rank's piece. A collective."""
        sent = piece.new_zeros(self._largest())
        sent[: piece.numel()] = piece.reshape(-1)
        received = piece.new_empty(len(sent) * self.num_ranks)
        if piece.dtype == torch.bool:  # gloo moves no bools
            dist.all_gather_into_tensor(received.view(torch.uint8), sent.view(torch.uint8), group=self.group)
        else:
            dist.all_gather_into_tensor(received, sent, group=self.group)
        sizes = [high - low for low, high in map(self.bounds, range(self.num_ranks))]
        parts = [part[:size] for part, size in zip(received.split(len(sent)), sizes, strict=True)]
        return torch.cat(parts).view(self.shape)

    def reduce(self, whole: torch.Tensor) -> torch.Tensor:
        """Flat fp64 piece of this rank of the sum over the group of every rank's whole tensor. A collective."""
        flat, size = whole.reshape(-1), self._largest()
        sent = torch.zeros(self.num_ranks, size, dtype=torch.float64, device=whole.device)
        for rank in range(self.num_ranks):
            low, high = self.bounds(rank)
            sent[rank, : high - low] = flat[low:high]
        received = sent.new_empty(size)
        _reduce_scatter(received, sent.view(-1), group=self.group)
        low, high = self.bounds()
        return received[: high - low]

    def _largest(self) -> int:
        """Elements of the largest piece: what every rank sends, because collectives want equal sizes."""
        return min(self.length, math.prod(self.shape))


def dealt_padded(items: Sequence[Item], rank: int, num_ranks: int) -> list[tuple[Item, bool]]:
    """Every num_ranks-th item; the short ranks run the last item once more without counting it, because a forward of
    a sharded model is a collective."""
    rounds = -(-len(items) // num_ranks)
    places = [turn * num_ranks + rank for turn in range(rounds)]
    return [(items[min(place, len(items) - 1)], place < len(items)) for place in places]
