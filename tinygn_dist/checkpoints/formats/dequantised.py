"""Quantised checkpoints read as weights: each tensor of codes becomes the matrix that it stands for, when it is asked
for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinygn_dist.checkpoints.formats import compressed_tensors
from tinygn_dist.checkpoints.formats.packed_bits import unpack
from tinygn_dist.checkpoints.safetensors_io import Kind, StoredTensors
from tinygn_dist.errors import Refused, UserError

Facts = Mapping[str, Any]
"""a checkpoint's `quantization_config`"""
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """A matrix (out, in) that is stored as several tensors of a module. decode: the matrix from its tensors by
    ending."""

    module: str
    endings: tuple[str, ...]
    decode: Callable[[Tensors], torch.Tensor]


@dataclass(frozen=True)
class Method:
    """How one kind of quantised checkpoint is read. mark: the ending of a tensor that every quantised module has.
    shape: (out, in) from those of its tensors, and what reads one of them. decoder: for a module; None where it is
    stored as it is."""

    mark: str
    scales: str
    endings: tuple[str, ...]
    shape: Callable[[Facts, Mapping[str, Kind], Callable[[str], torch.Tensor]], tuple[int, ...]]
    decoder: Callable[[Facts, str], Callable[[Tensors], torch.Tensor] | None]


def _compressed_tensors(facts: Facts, module: str) -> Callable[[Tensors], torch.Tensor] | None:
    how = compressed_tensors.Modules(facts).how(module)
    if how is None:
        return None
    return lambda found: compressed_tensors.decoded("weight", found, how)


def _compressed_shape(_: Facts, kinds: Mapping[str, Kind], read: Callable[[str], torch.Tensor]) -> tuple[int, ...]:
    return kinds["weight"].shape if "weight" in kinds else tuple(read("weight_shape").tolist())


def _gptq(facts: Facts, module: str) -> Callable[[Tensors], torch.Tensor]:
    """qweight (in * bits / 32, out) packed along the inputs, qzeros (groups, out * bits / 32), scales (groups, out),
    g_idx (in,): the group of each input. Zero points are stored one too small, but in the second edition of the
    format."""
    bits, one = facts["bits"], int(facts.get("checkpoint_format", "gptq") != "gptq_v2")

    def decode(found: Tensors) -> torch.Tensor:
        scales = found["scales"].float()
        num_inputs, out = len(found["qweight"]) * 32 // bits, scales.shape[1]
        codes = _unsigned(found["qweight"].t(), bits, num_inputs)
        zeros = _unsigned(found["qzeros"], bits, out) + one
        group_size = facts.get("group_size", -1)
        group = found.get("g_idx")
        if group is None:
            group = torch.arange(num_inputs) // (num_inputs if group_size == -1 else group_size)
        group = group.long()
        return ((codes - zeros.t()[:, group]) * scales.t()[:, group]).to(found["scales"].dtype)

    return decode


_INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)
"""where each output of eight lies in a word of AWQ"""


def _awq(facts: Facts, module: str) -> Callable[[Tensors], torch.Tensor]:
    """qweight (in, out / 8), eight outputs in a word, interleaved; qzeros (groups, out / 8), scales (groups, out)."""

    def decode(found: Tensors) -> torch.Tensor:
        if facts["bits"] != 4:
            raise Refused(f"AWQ of {facts['bits']} bits, accepted: 4; use the model it was made from")
        scales = found["scales"].float()
        num_inputs, out = found["qweight"].shape[0], scales.shape[1]
        codes, zeros = (
            _unsigned(found[name], 4, out).view(-1, out // 8, 8)[..., _INTERLEAVED].reshape(-1, out)
            for name in ("qweight", "qzeros")
        )
        width = num_inputs // len(scales)
        zeros, by_input = (each.repeat_interleave(width, 0) for each in (zeros, scales))
        return ((codes - zeros) * by_input).t().contiguous().to(found["scales"].dtype)

    return decode


def _unsigned(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """(rows, count) fp32 codes from 0 on."""
    return unpack(words, bits, count).float() + 2 ** (bits - 1)


METHODS: dict[str, Method] = {
    compressed_tensors.METHOD: Method(
        "weight_scale",
        "weight_scale",
        ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
        _compressed_shape,
        _compressed_tensors,
    ),
    "gptq": Method(
        "qweight",
        "scales",
        ("qweight", "qzeros", "scales", "g_idx"),
        lambda facts, kinds, _: (kinds["scales"].shape[1], kinds["qweight"].shape[0] * 32 // facts["bits"]),
        _gptq,
    ),
    "awq": Method(
        "qweight",
        "scales",
        ("qweight", "qzeros", "scales"),
        lambda _, kinds, __: (kinds["scales"].shape[1], kinds["qweight"].shape[0]),
        _awq,
    ),
}


class Dequantised(StoredTensors):
    """The tensors of a quantised checkpoint as those of the model it was made from. A weight is decoded whole whenever
    it, or some of it, is asked for."""

    def __init__(self, files: Sequence[Path], facts: Facts) -> None:
        """Raises Refused for a method that is not known, or what its reader does not know."""
        super().__init__(files)
        method = METHODS.get(facts["quant_method"])
        if method is None:
            raise Refused(
                f"the checkpoint is quantised by {facts['quant_method']}, which cannot be dequantised here; accepted: "
                f"{', '.join(METHODS)}; use the model it was made from"
            )
        self._method, self._facts, self._weights = method, facts, dict[str, Weight]()
        stored = set(super().names)
        hidden: set[str] = set()
        for name in sorted(stored):
            module, _, ending = name.rpartition(".")
            decode = method.decoder(facts, module) if ending == method.mark else None
            if decode is None:
                continue
            there = tuple(each for each in method.endings if f"{module}.{each}" in stored)
            self._weights[f"{module}.weight"] = Weight(module, there, decode)
            hidden |= {f"{module}.{each}" for each in there}
        self._names = [name for name in super().names if name not in hidden] + list(self._weights)

    @property
    def names(self) -> Sequence[str]:
        return self._names

    @property
    def dtypes(self) -> dict[str, str]:
        stored = super().dtypes
        return {
            name: stored[f"{self._weights[name].module}.{self._method.scales}" if name in self._weights else name]
            for name in self._names
        }

    def kind(self, name: str) -> Kind:
        weight = self._weights.get(name)
        if weight is None:
            return super().kind(name)
        kinds = {ending: super(Dequantised, self).kind(f"{weight.module}.{ending}") for ending in weight.endings}
        shape = self._method.shape(self._facts, kinds, lambda ending: self._stored(weight, ending))
        return Kind(shape, kinds[self._method.scales].dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.kind(name).shape

    def whole(self, name: str) -> torch.Tensor:
        """Raises UserError where scales hold NaN or inf."""
        weight = self._weights.get(name)
        if weight is None:
            return super().whole(name)
        found = {ending: self._stored(weight, ending) for ending in weight.endings}
        if not found[self._method.scales].isfinite().all():
            raise UserError(f"scales of {weight.module} hold NaN or inf; the checkpoint is broken, use another one")
        return weight.decode(found)

    def run(self, name: str, low: int, high: int) -> torch.Tensor:
        if name not in self._weights:
            return super().run(name, low, high)
        return self.whole(name).reshape(-1)[low:high] if high > low else torch.empty(0)

    def _stored(self, weight: Weight, ending: str) -> torch.Tensor:
        return super().whole(f"{weight.module}.{ending}")
