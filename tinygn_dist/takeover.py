"""Which feed-forward output takes over what removed layers gave. Pure: which layers, not how.

Layers that go in a row added some d to the residual stream. The output W of the feed-forward before them reads h, and is
re-fitted to W h + d by least squares over the calibration tokens (as ReplaceMe does behind the same weight, with a transform of
W h; Shopkhoev et al. 2025). The smaller model keeps its class, and d h^T is one forward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from tinygn_dist.anatomy import Anatomy, UnitGroup

Takers = dict[UnitGroup, tuple[int, ...]]
"""For each feed-forward the layers right behind it, in order, of which it may have to take over the first few."""


def takers_of(anatomy: Anatomy, order: Sequence[int]) -> Takers:
    """order: layers in the order in which they go, of which any first few may be gone. Only feed-forwards that write straight to the
    residual stream take over, within their stack."""
    found: Takers = {}
    for group in anatomy.of_kind("channels"):
        if group.added:
            stack = next(stack for stack in anatomy.stacks if group.layer in stack.layers)
            stays = order.index(group.layer) if group.layer in order else len(order)
            gone = order[:stays]  # by the time that its own layer goes
            behind = range(group.layer + 1, stack.layers.stop)
            found[group] = tuple(behind)[: run_behind(behind, gone)]
    return {group: behind for group, behind in found.items() if behind}


def run_behind(taken: Sequence[int], gone: Collection[int]) -> int:
    """How many of the layers behind a feed-forward are gone in a row."""
    return sum(1 for _ in itertools.takewhile(gone.__contains__, taken))


def left_to_nobody(takers: Takers, gone: Collection[int]) -> list[int]:
    """The removed layers that nothing takes over."""
    taken: set[int] = set()
    for group, behind in takers.items():
        if group.layer not in gone:
            taken.update(behind[: run_behind(behind, gone)])
    return sorted(set(gone) - taken)
