"""compressed-tensors: the files of quantised weights that transformers and vLLM read.

Beside `NAME.weight_scale`, (out, groups), a weight lies as `weight_packed` (pack-quantized: integers of 2 to 8 bits
without a gap, with `weight_shape` and, where there are zero points, `weight_zero_point` packed along the rows) or as an
int8 or fp8 `weight` (int-quantized, float-quantized). config.json says which modules are stored how. A value is (code -
zero point) * scale, computed in the dtype of the scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tinygn_dist.checkpoints.formats.packed_bits import pack, unpack
from tinygn_dist.checkpoints.safetensors_io import Kind
from tinygn_dist.errors import Refused
from tinygn_dist.maths.grids import Grid, Quantised, Scales, quantised, to_nearest

METHOD = "compressed-tensors"
Layout = Literal["pack-quantized", "int-quantized", "float-quantized"]
_LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_STRATEGIES = ("group", "channel", "tensor")


@dataclass(frozen=True)
class Stored:
    """How the weight of one module is stored. activations: what engines round its inputs to, token by token."""

    grid: Grid
    layout: Layout
    activations: Literal["int8", "fp8"] | None = None


def kinds(weight: str, kind: Kind, how: Stored) -> dict[str, Kind]:
    """What lies on disk for a weight, by name. weight: `NAME.weight`. kind: of the dense tensor, whose dtype scales
    have."""
    (out, num_inputs), grid = kind.shape, how.grid
    groups = num_inputs // grid.width_of_group(num_inputs)
    found = {f"{weight}_scale": Kind((out, groups), kind.dtype)}
    if how.layout != "pack-quantized":
        return {weight: Kind(kind.shape, grid.code_dtype)} | found
    found[f"{weight}_packed"] = Kind((out, -(-num_inputs * grid.bits // 32)), torch.int32)
    found[f"{weight}_shape"] = Kind((2,), torch.int64)
    if not grid.symmetric:
        found[f"{weight}_zero_point"] = Kind((-(-out * grid.bits // 32), groups), torch.int32)
    return found


def encoded(weight: str, values: torch.Tensor, scales: Scales, how: Stored) -> dict[str, torch.Tensor]:
    """The tensors of `kinds`. values: (out, in), on the grid of these scales; the codes follow from them."""
    found = quantised(to_nearest(values.float(), scales, how.grid), scales, how.grid)
    made = {f"{weight}_scale": found.scale.to(values.dtype)}
    if how.layout != "pack-quantized":
        return {weight: found.codes} | made
    made[f"{weight}_packed"] = pack(found.codes, how.grid.bits)
    made[f"{weight}_shape"] = torch.tensor(values.shape)
    if not how.grid.symmetric:
        made[f"{weight}_zero_point"] = pack(found.zero_point.t(), how.grid.bits).t().contiguous()
    return made


def decoded(weight: str, tensors: Mapping[str, torch.Tensor], how: Stored) -> torch.Tensor:
    """(out, in) values in the dtype of the scales. tensors: as `stored_codes` takes them."""
    return stored_codes(weight, tensors, how).values().to(tensors[f"{weight}_scale"].dtype)


def stored_codes(weight: str, tensors: Mapping[str, torch.Tensor], how: Stored) -> Quantised:
    """Codes, scales and zero points as they lie on disk. tensors: those of `kinds` by name; a scale may be one for the
    tensor."""
    scale, grid = tensors[f"{weight}_scale"], how.grid
    if how.layout == "pack-quantized":
        out, num_inputs = tensors[f"{weight}_shape"].tolist()
        codes = unpack(tensors[f"{weight}_packed"], grid.bits, num_inputs)
    else:
        codes = tensors[weight]
    scale = scale.reshape(-1, scale.shape[-1] if scale.dim() > 1 else 1).expand(len(codes), -1)
    zero_point = torch.zeros(scale.shape, dtype=torch.int8)
    if not grid.symmetric:
        zero_point = tensors[f"{weight}_zero_point"]
        if how.layout == "pack-quantized":
            zero_point = unpack(zero_point.t(), grid.bits, len(scale)).t()
    return Quantised(codes, scale.float(), zero_point)


def quantization_config(stored: Mapping[str, Stored], others: Sequence[str]) -> dict[str, Any]:
    """For config.json. stored: every quantised module by name. others: the names of all other Linear modules."""
    groups: dict[Stored, list[str]] = {}
    for module, how in stored.items():
        groups.setdefault(how, []).append(module)
    alone = len(groups) == 1
    layouts = {how.layout for how in groups}
    written = {
        f"group_{number}": {
            "targets": ["Linear"] if alone else [f"re:^{re.escape(module)}$" for module in modules],
            "weights": _arguments(how.grid),
            "input_activations": _activations(how.activations),
            "output_activations": None,
            "format": how.layout,
        }
        for number, (how, modules) in enumerate(groups.items())
    }
    packed_zeros = any(not how.grid.symmetric and how.layout == "pack-quantized" for how in groups)
    return {
        "quant_method": METHOD,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": list(others),
        "config_groups": written,
        # compressed-tensors 0.20 lays out no packed zero points for transformers to load, but dequantises them
        **({"dequantize": True} if packed_zeros else {}),
    }


def _arguments(grid: Grid) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": grid.group_size} if grid.group_size else {"strategy": "channel"}
    return {"num_bits": grid.bits, "type": grid.kind, "symmetric": grid.symmetric, "dynamic": False} | strategy


def _activations(name: str | None) -> dict[str, Any] | None:
    if name is None:
        return None
    kind = {"int8": "int", "fp8": "float"}[name]
    return {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"}


class Modules:
    """Which modules a checkpoint's `quantization_config` says are quantised, and how."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises Refused for what cannot be turned into weights: other strategies, formats with several scales."""
        self._ignored = [_matcher(pattern) for pattern in config.get("ignore") or ()]
        self._groups: list[tuple[list[re.Pattern[str]], Stored]] = []
        for group in config["config_groups"].values():
            layout = group.get("format") or config["format"]
            self._groups.append(([_matcher(each) for each in group["targets"]], _stored(group["weights"], layout)))

    def how(self, module: str) -> Stored | None:
        """None where it is stored as it is."""
        if any(pattern.search(module) for pattern in self._ignored):
            return None
        return next((how for targets, how in self._groups if any(t.search(module) for t in targets)), None)


def _matcher(pattern: str) -> re.Pattern[str]:
    """A name, `re:` and an expression that matches from the start, or the class of all that are quantised."""
    if pattern in ("Linear", "Embedding"):
        return re.compile("")
    expression = pattern.removeprefix("re:")
    return re.compile(f"^(?:{expression})" if expression != pattern else f"^{re.escape(pattern)}$")


def _stored(weights: Mapping[str, Any], layout: str) -> Stored:
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if strategy not in _STRATEGIES or layout not in _LAYOUTS or weights.get("actorder") == "group":
        raise Refused(
            f"weights quantised by compressed-tensors as {layout} with strategy {strategy}; accepted: pack-quantized, "
            "int-quantized and float-quantized, by tensor, channel or group; use the model it was made from"
        )
    group_size = weights.get("group_size") if strategy == "group" else None
    grid = Grid(weights["num_bits"], weights.get("symmetric", True), group_size, weights["type"])
    known = {"float": "float-quantized"}.get(grid.kind, "int-quantized" if layout == "naive-quantized" else layout)
    return Stored(grid, known)
