"""Which way of cutting serves a pattern: the module that plans mixes, says what a sparsity is a share of, and removes units."""

from __future__ import annotations

from types import ModuleType

from tinygn_dist import filters, uneven, units, width
from tinygn_dist.anatomy import Anatomy
from tinygn_dist.config import PruneConfig


def cut_of(anatomy: Anatomy, options: PruneConfig) -> ModuleType:
    """Of these, each with plan_mixes(anatomy, options), dense_params(anatomy) and remove_units(setting, mixes, options)."""
    if options.pattern == "hidden":
        return width
    if anatomy.of_kind("filters"):
        return filters
    return uneven if options.uneven else units
