"""Which way of cutting serves a pattern: the module that plans mixes, says what a sparsity is a share of, and removes units."""

from __future__ import annotations

from types import ModuleType

from tinygn_dist.config import PruneConfig
from tinygn_dist.experiments import hidden_width
from tinygn_dist.models.anatomy import Anatomy
from tinygn_dist.prune.structured import filters, layers_heads_channels, uneven_channels


def cut_of(anatomy: Anatomy, options: PruneConfig) -> ModuleType:
    """Of these, each with plan_mixes(anatomy, options), dense_params(anatomy) and remove_units(setting, mixes, options)."""
    if options.pattern == "hidden":
        return hidden_width
    if anatomy.of_kind("filters"):
        return filters
    return uneven_channels if options.uneven else layers_heads_channels
