"""The exact k largest of scores that lie in disjoint pieces on many ranks, without gathering them.

Radix select over the 32 bits of an fp32 score (its bit pattern, made monotone): one histogram of the high 16 bits and
one of the low 16 bits inside the chosen bin, each summed over the shards (512 KiB of int64). Ties at the k-th value go
to the smallest global index, found by the same radix select over indices. The result is the same for any sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_BINS = 1 << 16
_CHUNK = 1 << 20
Reduce = Callable[[torch.Tensor], torch.Tensor]


def keep_largest(
    pieces: Sequence[torch.Tensor], starts: Sequence[int], keep: int, sum_over_shards: Reduce
) -> list[torch.Tensor]:
    """Boolean masks of the pieces with exactly `keep` True over all ranks.

    pieces: this rank's fp32 scores, any shapes, may be empty. starts: global index of each piece's first element,
    unique over all pieces and ranks. Raises ValueError on NaN.
    """
    threshold, above = kth_largest(pieces, keep, sum_over_shards)
    if threshold is None:
        return [
            torch.ones_like(piece, dtype=torch.bool) if keep else torch.zeros_like(piece, dtype=torch.bool)
            for piece in pieces
        ]
    masks = [(piece > threshold).contiguous() for piece in pieces]
    ties = [(piece == threshold).flatten().nonzero().squeeze(1) for piece in pieces]
    indices = (
        torch.cat([tie + start for tie, start in zip(ties, starts, strict=True)]) if pieces else torch.empty(0).long()
    )
    last = _kth_smallest_index(indices, keep - above, sum_over_shards)
    for mask, tie, start in zip(masks, ties, starts, strict=True):
        chosen = tie[tie + start <= last]
        mask.view(-1)[chosen] = True
    return masks


def kth_largest(pieces: Sequence[torch.Tensor], k: int, sum_over_shards: Reduce) -> tuple[float | None, int]:
    """The k-th largest score over all ranks and how many are strictly larger; (None, 0) when k is 0 or everything."""
    total = torch.tensor([sum(p.numel() for p in pieces), sum(int(p.isnan().sum()) for p in pieces)])
    size, num_nan = sum_over_shards(total).tolist()
    if num_nan:
        raise ValueError(f"{num_nan} of {size} scores are NaN")
    if not 0 <= k <= size:
        raise ValueError(f"asked to keep {k} of {size} scores")
    if k in (0, size):
        return None, 0
    high = sum_over_shards(_histogram(pieces, lambda keys: keys >> 16))
    top, above = _bin_from_the_top(high, k)
    low = sum_over_shards(_histogram(pieces, lambda keys: keys[(keys >> 16) == top] & 0xFFFF))
    bottom, above_low = _bin_from_the_top(low, k - above)
    return _score_of(top << 16 | bottom), above + above_low


def _keys(scores: torch.Tensor) -> torch.Tensor:
    """int64 in [0, 2^32), ordered like the fp32 scores; -0 equals +0."""
    bits = (scores.flatten().float() + 0.0).view(torch.int32)
    return torch.where(bits < 0, ~bits, bits ^ -(1 << 31)).to(torch.int64) & 0xFFFFFFFF


def _score_of(key: int) -> float:
    bits = key - (1 << 31) if key >> 31 else ~key
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()


def _histogram(pieces: Sequence[torch.Tensor], bin_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for piece in pieces:
        for chunk in piece.flatten().split(_CHUNK):  # bounded temporaries, whatever the size of a weight
            counts += torch.bincount(bin_of(_keys(chunk)), minlength=_BINS).cpu()
    return counts


def _bin_from_the_top(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """The bin holding the k-th largest, and how many lie in higher bins."""
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top < k).sum())
    return _BINS - 1 - place, int(from_top[place - 1]) if place else 0


def _kth_smallest_index(indices: torch.Tensor, k: int, sum_over_shards: Reduce) -> int:
    """The k-th smallest of unique indices below 2^48 that are spread over the ranks (k >= 1)."""
    prefix = 0
    for shift in (32, 16, 0):
        inside = indices[(indices >> (shift + 16)) == prefix]
        counts = sum_over_shards(torch.bincount((inside >> shift) & 0xFFFF, minlength=_BINS).cpu()).cumsum(0)
        place = int((counts < k).sum())
        k -= int(counts[place - 1]) if place else 0
        prefix = prefix << 16 | place
    return prefix
