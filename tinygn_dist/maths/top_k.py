"""The exact k largest of scores that lie in disjoint pieces on many ranks, without gathering them.

Radix select over the 32 bits of an fp32 score: one histogram of the high 16 bits and one of the low 16 bits inside
the chosen bin, each summed over the shards (512 KiB of int64); bins are put in the order of the numbers afterwards.
Ties at the k-th value go to the smallest global index, found by the same radix select over indices. The result is
the same for any sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_BINS = 1 << 16
_CHUNK = 1 << 19
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
    # of a model of which a part is offloaded, pieces lie in both places
    indices = [(tie + start).cpu() for tie, start in zip(ties, starts, strict=True)]
    last = _kth_smallest_index(torch.cat(indices or [torch.empty(0).long()]), keep - above, sum_over_shards)
    for mask, tie, start in zip(masks, ties, starts, strict=True):
        chosen = tie[tie + start <= last]
        mask.view(-1)[chosen] = True
    return masks


def kth_largest(pieces: Sequence[torch.Tensor], k: int, sum_over_shards: Reduce) -> tuple[float | None, int]:
    """The k-th largest score over all ranks and how many are strictly larger; (None, 0) when k is 0 or everything.

    Sends 1 MiB and a few numbers, and takes a few MiB of memory beside the scores, whatever their number.
    """
    halves = sum_over_shards(_histogram(pieces, _high))
    num_nan = _num_nan(halves, pieces, sum_over_shards)
    size = int(halves.sum())
    if num_nan:
        raise ValueError(f"{num_nan} of {size} scores are NaN")
    if not 0 <= k <= size:
        raise ValueError(f"asked to keep {k} of {size} scores")
    if k in (0, size):
        return None, 0
    half = _BINS // 2  # high bits from there on are those of negative scores, the larger the smaller
    high, above = _bin_from_the_top(torch.cat([halves[half:].flip(0), halves[:half]]), k)
    high = high - half if high >= half else _BINS - 1 - high
    inside = sum_over_shards(_histogram(pieces, lambda bits: bits[_high(bits) == high].bitwise_and_(_BINS - 1)))
    low, above_low = _bin_from_the_top(inside.flip(0) if high >= half else inside, k - above)
    low = _BINS - 1 - low if high >= half else low  # of two negative scores the smaller bits are the larger
    bits = high << 16 | low
    score = torch.tensor(bits - (1 << 32) if bits >> 31 else bits, dtype=torch.int32).view(torch.float32).item()
    return score, above + above_low


_INFINITE = (0x7F80, 0xFF80)
"""the high bits of infinities, and of some NaN"""


def _high(bits: torch.Tensor) -> torch.Tensor:
    return (bits >> 16).bitwise_and_(_BINS - 1)


def _histogram(pieces: Sequence[torch.Tensor], bin_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(_BINS,) int64 counts on the CPU. bin_of: from int32 bit patterns, in which -0 is +0."""
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for piece in pieces:
        for chunk in piece.flatten().split(_CHUNK):  # bounded temporaries, whatever the size of a weight
            bits = (chunk.float() + 0.0).view(torch.int32)
            counts += torch.bincount(bin_of(bits), minlength=_BINS).cpu()
    return counts


def _num_nan(halves: torch.Tensor, pieces: Sequence[torch.Tensor], sum_over_shards: Reduce) -> int:
    """From the summed histogram of high bits. The scores themselves are looked at only where some are infinite."""
    surely = sum(int(halves[start + 1 : start + 0x80].sum()) for start in _INFINITE)
    if not any(int(halves[start]) for start in _INFINITE):
        return surely
    infinite = sum(int(chunk.isinf().sum()) for piece in pieces for chunk in piece.flatten().split(_CHUNK))
    infinite = int(sum_over_shards(torch.tensor([infinite])))
    return surely + sum(int(halves[start]) for start in _INFINITE) - infinite


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
        counts = sum_over_shards(torch.bincount((inside >> shift) & 0xFFFF, minlength=_BINS)).cumsum(0)
        place = int((counts < k).sum())
        k -= int(counts[place - 1]) if place else 0
        prefix = prefix << 16 | place
    return prefix
