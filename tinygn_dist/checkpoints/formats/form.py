"""How the tensors of a model lie in the files that are written: dtypes, and weights that are stored as codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tinygn_dist.checkpoints.formats import compressed_tensors
from tinygn_dist.checkpoints.formats.compressed_tensors import Stored
from tinygn_dist.checkpoints.safetensors_io import Kind
from tinygn_dist.maths.grids import Scales


@dataclass(frozen=True)
class Form:
    """dtypes: of the tensors to write, by name; others keep theirs. codes: how a weight on its grid is stored, and its
    scales, by the weight's name. plain: Linear modules beside those."""

    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    codes: Mapping[str, tuple[Stored, Scales]] = field(default_factory=dict)
    plain: tuple[str, ...] = ()

    def kinds(self, name: str, kind: Kind) -> dict[str, Kind]:
        """What lies on disk for a tensor, by name."""
        if name not in self.codes:
            return {name: kind}
        return compressed_tensors.kinds(name, kind, self.codes[name][0])

    def encoded(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if name not in self.codes:
            return {name: tensor}
        how, scales = self.codes[name]
        return compressed_tensors.encoded(name, tensor, Scales(*(each.cpu() for each in scales)), how)

    def quantization_config(self) -> dict[str, Any] | None:
        """For config.json; None where nothing is stored as codes."""
        if not self.codes:
            return None
        modules = {name.removesuffix(".weight"): how for name, (how, _) in self.codes.items()}
        return compressed_tensors.quantization_config(modules, self.plain)
