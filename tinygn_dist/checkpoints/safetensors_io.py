"""Checkpoint files tensor by tensor: safetensors read in pieces, and written without ever holding two tensors.

The format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes of header length, a JSON header that says where
each tensor lies, then the tensors' bytes. `safetensors.torch.save_file` wants all tensors of a file at once, so files
are written here; they are read back with the library.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
_NAMED = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class Kind:
    """What a tensor is, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class StoredTensors:
    """The tensors of some safetensors files; nothing is read until it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._opened = [safe_open(file, framework="pt") for file in files]
        self._where = {name: opened for opened in self._opened for name in opened.keys()}  # noqa: SIM118 - not a dict

    @property
    def names(self) -> Sequence[str]:
        return list(self._where)

    @property
    def dtypes(self) -> dict[str, str]:
        """In the words of the format, which has more of them than are read here."""
        return {name: opened.get_slice(name).get_dtype() for name, opened in self._where.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def kind(self, name: str) -> Kind:
        piece = self._where[name].get_slice(name)
        return Kind(tuple(piece.get_shape()), _NAMED[piece.get_dtype()])

    def whole(self, name: str) -> torch.Tensor:
        return self._where[name].get_tensor(name)

    def run(self, name: str, low: int, high: int) -> torch.Tensor:
        """Flat elements [low, high); of a matrix no more rows are read than hold them."""
        piece = self._where[name].get_slice(name)
        shape = piece.get_shape()
        if not shape or high <= low:
            return self.whole(name).reshape(-1)[low:high]
        width = math.prod(shape[1:])
        first, last = low // width, -(-high // width)
        return piece[first:last].reshape(-1)[low - first * width : high - first * width]


@dataclass(frozen=True)
class Written:
    """What went into a file: digest of the bytes, how many values, how many of them zero. carried: whether it is no
    tensor of the model and was only carried over."""

    digest: str
    size: int
    zeros: int
    is_matrix: bool
    carried: bool = field(default=False, compare=False)


def written(name: str, tensor: torch.Tensor) -> Written:
    """The facts of one tensor, from its bits."""
    counted = tensor.half() if tensor.dtype == torch.float8_e4m3fn else tensor  # torch does not count in fp8
    zeros = tensor.numel() - int(torch.count_nonzero(counted))
    digest = hashlib.sha256(_bytes(tensor)).hexdigest()
    return Written(digest, tensor.numel(), zeros, tensor.dim() > 1 and not name.endswith("bias"))


class ShardWriter:
    """Writes tensors, in any order, into safetensors files of at most `max_bytes` (one tensor may exceed it).

    layout: every tensor that will come, by its name on disk. The files are laid out from it before the first tensor
    arrives, and the index beside several files as `save_pretrained` writes it.
    """

    def __init__(self, folder: Path, layout: Mapping[str, Kind], max_bytes: float) -> None:
        shards: list[dict[str, Kind]] = [{}]
        for name, kind in layout.items():
            if shards[-1] and sum(k.nbytes for k in shards[-1].values()) + kind.nbytes > max_bytes:
                shards.append({})
            shards[-1][name] = kind
        count, self._places = len(shards), {}
        for number, shard in enumerate(shards, 1):
            stem, dot, ending = SAFE_WEIGHTS_NAME.partition(".")
            name = SAFE_WEIGHTS_NAME if count == 1 else f"{stem}-{number:05}-of-{count:05}{dot}{ending}"
            self._begin(folder / name, shard)
        if count > 1:
            total = sum(kind.nbytes for kind in layout.values())
            weight_map = {name: file.name for name, (file, _, _) in sorted(self._places.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
        self.done: dict[str, Written] = {}

    def _begin(self, file: Path, shard: Mapping[str, Kind]) -> None:
        header, start = {"__metadata__": {"format": "pt"}}, 0
        for name, kind in shard.items():
            offsets = [start, start + kind.nbytes]
            header[name] = {"dtype": _DTYPES[kind.dtype], "shape": list(kind.shape), "data_offsets": offsets}
            start = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors' bytes start aligned
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        for name, kind in shard.items():
            self._places[name] = (file, 8 + len(text) + header[name]["data_offsets"][0], kind)

    def add(self, name: str, tensor: torch.Tensor, carried: bool = False) -> None:
        """Write one tensor's bytes to their place. Raises OSError when the disk is full."""
        file, place, kind = self._places.pop(name)
        assert Kind(tuple(tensor.shape), tensor.dtype) == kind, f"{name}: {tuple(tensor.shape)} for {kind}"
        with open(file, "r+b") as out:
            out.seek(place)
            out.write(_bytes(tensor))
        self.done[name] = replace(written(name, tensor), carried=carried)

    def finish(self) -> dict[str, Written]:
        """What was written, by name; every tensor of the layout must have come."""
        assert not self._places, f"{next(iter(self._places))} was never written"
        return self.done


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
