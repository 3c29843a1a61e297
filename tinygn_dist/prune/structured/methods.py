"""Which method removes the units of a pattern: the table. The contract is in `removal.py`."""

from __future__ import annotations

from tinygn_dist.config import PruneConfig
from tinygn_dist.models.anatomy import Anatomy
from tinygn_dist.prune.structured.filters import Filters
from tinygn_dist.prune.structured.layers_heads_channels import LayersHeadsChannels
from tinygn_dist.prune.structured.removal import UnitMethod
from tinygn_dist.prune.structured.uneven_channels import UnevenChannels
from tinygn_dist.registry import experimental

EVEN, UNEVEN, CONVOLUTIONAL = "even", "uneven", "convolutional"
METHODS: dict[str, UnitMethod] = {
    EVEN: LayersHeadsChannels(),
    UNEVEN: UnevenChannels(),
    CONVOLUTIONAL: Filters(),
}
"""by the name of a pattern, or else by how the units of a model lie; experiments add patterns of their own"""


def method_of(anatomy: Anatomy, options: PruneConfig) -> UnitMethod:
    """The method for a model and what is asked of it."""
    patterns = experimental("METHODS", UnitMethod)
    if options.pattern in patterns:
        return patterns[options.pattern]
    if anatomy.of_kind("filters"):
        return METHODS[CONVOLUTIONAL]
    return METHODS[UNEVEN if options.uneven else EVEN]
