"""The weights of a checkpoint folder one by one, dense or as the codes that lie there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tinygn_dist.checkpoints.formats import compressed_tensors
from tinygn_dist.checkpoints.safetensors_io import StoredTensors
from tinygn_dist.errors import Refused
from tinygn_dist.maths.grids import Quantised

_OF_PACKED = re.compile(r"\.weight_(packed|scale|shape|zero_point)$")
_RECOMPUTED = "rotary_emb.inv_freq"


class Weights(Protocol):
    """What a format is written from. Names are those of the model's state."""

    @property
    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading values."""

    def dense(self, name: str) -> torch.Tensor:
        """Values; of quantised weights those that their codes stand for."""

    def codes(self, name: str) -> Quantised | None:
        """None for a weight that is not quantised."""


class StoredWeights:
    """Of safetensors files, compressed-tensors among them; one tensor is read at a time."""

    def __init__(self, files: Iterable[Path], quantization: Mapping[str, Any] | None) -> None:
        """quantization: `quantization_config` of config.json. Raises Refused for a method that is not readable here."""
        self._stored = StoredTensors(files)
        if quantization and quantization.get("quant_method") != compressed_tensors.METHOD:
            method = quantization.get("quant_method", "unknown")
            raise Refused(f"weights are quantised by {method}, accepted: {compressed_tensors.METHOD} or dense")
        self._modules = compressed_tensors.Modules(quantization) if quantization else None
        plain = {_OF_PACKED.sub(".weight", name) for name in self._stored.names}
        self._names = sorted(name for name in plain if not name.endswith(_RECOMPUTED))

    @property
    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if f"{name}_shape" in self._stored.names:
            return tuple(self._stored.whole(f"{name}_shape").tolist())
        return self._stored.kind(name).shape

    def dense(self, name: str) -> torch.Tensor:
        found = self.codes(name)
        return self._stored.whole(name) if found is None else found.values()

    def codes(self, name: str) -> Quantised | None:
        module = name.removesuffix(".weight")
        how = self._modules.how(module) if self._modules else None
        if how is None or f"{name}_scale" not in self._stored.names:
            return None
        own = [other for other in self._stored.names if other == name or other.startswith(f"{name}_")]
        return compressed_tensors.stored_codes(name, {other: self._stored.whole(other) for other in own}, how)
