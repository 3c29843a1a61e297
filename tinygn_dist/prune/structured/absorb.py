"""Which feed-forward output takes over what removed layers gave. Pure: which layers, not how.

Layers that go in a row added some d to the residual stream. The output W of the feed-forward before them reads h, and is
re-fitted to W h + d by least squares over the calibration tokens (as ReplaceMe does behind the same weight, with a transform of
W h; Shopkhoev et al. 2025). The smaller model keeps its class, and d h^T is one forward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from tinygn_dist.models.anatomy import Anatomy, UnitGroup

Takers = dict[UnitGroup, tuple[tuple[int, ...], ...]]
"""For each feed-forward the layers right behind it, in order, cut into segments of which it takes over the first few."""


def takers_of(anatomy: Anatomy, removals: Sequence[Collection[int]]) -> Takers:
    """removals: every set of layers that may be gone. Only feed-forwards that write straight to the residual stream take over, within
    their stack. Segments end where one of the removals does, so what a segment's layers gave is only ever needed as one sum."""
    found: Takers = {}
    for group in anatomy.of_kind("channels"):
        stack = next(stack for stack in anatomy.stacks if group.layer in stack.layers)
        behind = range(group.layer + 1, stack.layers.stop)
        ends = {_run(behind, gone) for gone in removals if group.layer not in gone} - {0}
        if group.added and ends:
            found[group] = tuple(tuple(behind[start:end]) for start, end in itertools.pairwise([0, *sorted(ends)]))
    return found


def segments_gone(segments: Sequence[Sequence[int]], gone: Collection[int]) -> int:
    """How many of the segments behind a feed-forward are gone in a row."""
    return sum(1 for _ in itertools.takewhile(set(gone).issuperset, segments))


def left_to_nobody(takers: Takers, gone: Collection[int]) -> list[int]:
    """The removed layers that nothing takes over."""
    taken: set[int] = set()
    for group, segments in takers.items():
        if group.layer not in gone:
            taken.update(*segments[: segments_gone(segments, gone)])
    return sorted(set(gone) - taken)


def _run(layers: Sequence[int], gone: Collection[int]) -> int:
    """How many of them are gone in a row."""
    return sum(1 for _ in itertools.takewhile(gone.__contains__, layers))
