"""Layers that may keep different numbers of channels or filters: which of them share a width, and the most even cut.

A *slot* is the groups that keep the same fraction of their units, because one entry of the config says how many all of
them have. How a cut is improved from there differs: channels cost parameters one by one, so measured losses can be
added up (`uneven_channels.py`); what a filter costs depends on how many others are left, so filters go step by step
(`filters.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tinygn_dist.maths.counts import Mix, channel_cuts, evenly
from tinygn_dist.models.anatomy import Anatomy, UnitGroup

Removed = Mapping[UnitGroup, int]
"""how many units of a group go; none of a group that is not named"""


@dataclass(frozen=True)
class Slot:
    groups: tuple[UnitGroup, ...]

    @property
    def parts(self) -> int:
        """How many equal parts each group can be cut into: the greatest common divisor of their sizes."""
        return math.gcd(*(group.num_units for group in self.groups))

    def cuts(self, multiple_of: int) -> list[int]:
        """How many parts may go, fewest first."""
        return [0, *channel_cuts(self.parts, multiple_of)]

    def removed(self, count: int) -> dict[UnitGroup, int]:
        """When so many parts go."""
        return {group: group.num_units // self.parts * count for group in self.groups}


def slots_by(groups: Iterable[UnitGroup], keys_of: Callable[[UnitGroup], Iterable[Hashable]]) -> list[Slot]:
    """Groups that have a key in common, directly or through others, share a slot."""
    slots: list[tuple[set[Hashable], list[UnitGroup]]] = []
    for group in groups:
        keys = set(keys_of(group))
        same = [slot for slot in slots if slot[0] & keys]
        merged = keys.union(*(slot[0] for slot in same)), [*(g for slot in same for g in slot[1]), group]
        slots = [slot for slot in slots if slot not in same] + [merged]
    return [Slot(tuple(members)) for _, members in slots]


def removed_by(slots: Sequence[Slot], counts: Sequence[int]) -> dict[UnitGroup, int]:
    """When so many parts of each slot go."""
    return {g: n for slot, count in zip(slots, counts, strict=True) for g, n in slot.removed(count).items()}


def most_even(slots: Sequence[Slot], multiple_of: int, enough: Callable[[Removed], bool]) -> list[int] | None:
    """How many parts of each slot go, as even as possible and no more than enough; None where all that may go are
    not."""
    cuts = [slot.cuts(multiple_of) for slot in slots]
    return evenly([slot.parts for slot in slots], cuts, lambda counts: enough(removed_by(slots, counts)))


def largest_cut(slots: Sequence[Slot], multiple_of: int) -> dict[UnitGroup, int]:
    """When all go that may."""
    return removed_by(slots, [slot.cuts(multiple_of)[-1] for slot in slots])


def uneven_mix(anatomy: Anatomy, kind: str, removed: Removed) -> Mix:
    each = tuple(removed.get(group, 0) for group in anatomy.of_kind(kind))
    return Mix(**{kind: max(each, default=0)}, uneven=each)


def removed_of(anatomy: Anatomy, kind: str, mix: Mix) -> dict[UnitGroup, int]:
    """The other way round."""
    return dict(zip(anatomy.of_kind(kind), mix.uneven, strict=True))
