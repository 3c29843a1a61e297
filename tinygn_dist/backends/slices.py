"""A stored weight cut into equal runs of its flat elements, one per rank; the last ones may be short or empty.

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
    """shape: of the stored weight. length: elements per rank (the runs of the last ranks may hold less). rank and
    num_ranks: within `group`, the ranks that hold the weight once between them."""

    shape: tuple[int, ...]
    length: int
    rank: int
    num_ranks: int
    group: dist.ProcessGroup | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def start(self) -> int:
        """Flat index of this rank's first element."""
        return min(self.rank * self.length, self.numel)

    @property
    def stop(self) -> int:
        return min(self.start + self.length, self.numel)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """(stop - start,) copy of this rank's run of a whole tensor, which may be dropped afterwards."""
        return whole.reshape(-1)[self.start : self.stop].clone()

    def gather(self, piece: torch.Tensor) -> torch.Tensor:
        """The whole tensor, shaped as stored, from every rank's piece. A collective."""
        sent = piece.new_zeros(self.length)
        sent[: piece.numel()] = piece.reshape(-1)
        received = piece.new_empty(self.length * self.num_ranks)
        if piece.dtype == torch.bool:  # gloo moves no bools
            dist.all_gather_into_tensor(received.view(torch.uint8), sent.view(torch.uint8), group=self.group)
        else:
            dist.all_gather_into_tensor(received, sent, group=self.group)
        return received[: self.numel].view(self.shape)

    def reduce(self, whole: torch.Tensor) -> torch.Tensor:
        """(stop - start,) this rank's run of the sum over the group of every rank's whole tensor. A collective."""
        sent = whole.new_zeros(self.length * self.num_ranks)
        sent[: self.numel] = whole.reshape(-1)
        received = whole.new_empty(self.length)
        _reduce_scatter(received, sent, group=self.group)
        return received[: self.stop - self.start]


def share_padded(items: Sequence[Item], rank: int, num_ranks: int) -> list[tuple[Item, bool]]:
    """Every num_ranks-th item; the short ranks run the last item once more without counting it, because a forward of
    a sharded model is a collective."""
    rounds = -(-len(items) // num_ranks)
    places = [turn * num_ranks + rank for turn in range(rounds)]
    return [(items[min(place, len(items) - 1)], place < len(items)) for place in places]
