"""Which units a model keeps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from tinygn_dist.maths.unit_kinds import INNER_KINDS


@dataclass(frozen=True)
class KeptUnits:
    """What stays, by index in the dense model. The other kinds: per kept layer, ascending."""

    layers: tuple[int, ...]
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    channels: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    filters: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """by group of filters, in a convolutional net"""
    hidden: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """under 0, of the whole model"""

    def of(self, kind: str) -> Mapping[int, tuple[int, ...]]:
        return getattr(self, kind)

    def fingerprint(self) -> str:
        """16 hex digits, equal for equal choices."""
        stays = [self.layers, *(sorted(self.of(kind).items()) for kind in INNER_KINDS)]
        return hashlib.sha256(json.dumps(stays).encode()).hexdigest()[:16]
