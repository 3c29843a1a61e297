"""How sparse: at the end, at an update on the way, after each pass of the solver."""

from __future__ import annotations

import math
from typing import NamedTuple

from tinygn_dist.config import NM, PruneConfig
from tinygn_dist.maths.counts import num_kept
from tinygn_dist.maths.schedules import sparsity_between


class Level(NamedTuple):
    """sparsity: share of the weights that are zero. nm: where N of every M inputs are kept, and the sparsity is 1 -
    N/M."""

    sparsity: float
    nm: NM | None = None

    def __str__(self) -> str:
        return f"{self.nm.n}:{self.nm.m}" if self.nm else f"{self.sparsity:.6f}"


def final_level(options: PruneConfig) -> Level:
    """What the pattern and the sparsity ask for."""
    return Level(1 - options.nm.n / options.nm.m, options.nm) if options.nm else Level(options.sparsity)


def level_at(final: Level, sparsity: float) -> Level | None:
    """The level at a sparsity on the way, None for nothing. N:M goes down from M:M in whole steps."""
    if final.nm is None:
        return Level(sparsity) if sparsity > 0 else None
    m = final.nm.m
    n = max(final.nm.n, num_kept(m, sparsity))
    return Level(1 - n / m, NM(n, m)) if n < m else None


def levels_of_passes(final: Level, passes: int | None = None) -> list[Level]:
    """After each pass of the solver: the same share of what is left goes each time, in as many passes as asked, or as
    it takes that no pass removes more than half."""
    count = passes or max(1, math.ceil(math.log2(1 / (1 - final.sparsity)) - 1e-9))
    on_the_way = (
        level_at(final, sparsity_between("iterative", 0.0, final.sparsity, k / count)) for k in range(1, count)
    )
    return list(dict.fromkeys([*filter(None, on_the_way), final]))  # N:M has few steps
