"""Which feed-forward absorbs removed layers: is re-fitted to reproduce their output beside its own. Pure: which layers,
not how.

Layers that go in a row added some d to the residual stream. The output W of the feed-forward before them reads h, and
is re-fitted to W h + d by least squares over the calibration tokens (as ReplaceMe does behind the same weight, with a
transform of W h; Shopkhoev et al. 2025). The smaller model keeps its class, and d h^T is one forward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from tinygn_dist.models.anatomy import Anatomy, UnitGroup

Segments = tuple[tuple[int, ...], ...]
Absorbers = dict[UnitGroup, Segments]
"""For each feed-forward the layers right behind it, in order, cut into segments of which it absorbs the first few."""


def absorbers_of(anatomy: Anatomy, removals: Sequence[Collection[int]]) -> Absorbers:
    """removals: every set of layers that may be removed. Only feed-forwards that write straight to the residual stream
    absorb, and only within their stack. Segments end where one of the removals does, so the output of a segment's
    layers is only ever needed as one sum."""
    found: Absorbers = {}
    for group in anatomy.of_kind("channels"):
        stack = next(stack for stack in anatomy.stacks if group.layer in stack.layers)
        behind = range(group.layer + 1, stack.layers.stop)
        ends = {_run_length(behind, removed) for removed in removals if group.layer not in removed} - {0}
        if group.added and ends:
            found[group] = tuple(tuple(behind[start:end]) for start, end in itertools.pairwise([0, *sorted(ends)]))
    return found


def segments_removed(segments: Sequence[Sequence[int]], removed: Collection[int]) -> int:
    """How many of the segments behind a feed-forward are removed in a row."""
    return sum(1 for _ in itertools.takewhile(set(removed).issuperset, segments))


def not_absorbed(absorbers: Absorbers, removed: Collection[int]) -> list[int]:
    """The removed layers that no feed-forward reproduces."""
    absorbed: set[int] = set()
    for group, segments in absorbers.items():
        if group.layer not in removed:
            absorbed.update(*segments[: segments_removed(segments, removed)])
    return sorted(set(removed) - absorbed)


def _run_length(layers: Sequence[int], removed: Collection[int]) -> int:
    """How many of them are removed in a row."""
    return sum(1 for _ in itertools.takewhile(removed.__contains__, layers))
