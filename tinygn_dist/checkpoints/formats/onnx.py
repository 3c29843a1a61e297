"""ONNX: a graph of any widths that ONNX Runtime runs on every CPU, made by torch.export.

A causal language model reads `input_ids` and the keys and values of the tokens before, and returns logits and the keys
and values with the new tokens: inputs `past.N.key`, `past.N.value` of (batch, KV heads, past, head size), outputs
`present.N.key`, `present.N.value`. Other models read what their tokenizer or processor makes. Matrices become blocks of
2, 4 or 8 bits (MatMulNBits), or int8 with dynamic activations, through onnxruntime's quantizers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache

from tinygn_dist.errors import Refused, UserError

EXTRA = ("onnx", "onnxscript", "onnxruntime")
INSTALL = "pip install 'tinygn-dist[onnx]'"
BLOCK = 32
_SPARE = 2.2
"""the graph in fp32 and the quantised one lie on the disk together, and protobuf copies a little"""


@dataclass(frozen=True)
class GraphType:
    """bits: of a block's codes; None: no blocks. int8: weights and activations, chosen at run time."""

    bits: int | None = None
    int8: bool = False


TYPES: Mapping[str, GraphType] = {
    "F32": GraphType(),
    "INT8": GraphType(int8=True),
    "Q8": GraphType(bits=8),
    "Q4": GraphType(bits=4),
    "Q2": GraphType(bits=2),
}


def refuse_without_extra() -> None:
    """UserError naming the pip command when a package of the extra is missing."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}; run: {INSTALL}")


def write_onnx(path: Path, model: nn.Module, inputs: Mapping[str, torch.Tensor] | None, type_name: str) -> None:
    """model: in eval mode on the CPU, fp32. inputs: a batch of what it reads, (batch, ...) each; None: a causal
    language model, which reads token ids.

    Written beside the path and renamed when complete; weights beyond protobuf's 2 GiB lie in `NAME.data` beside it.
    Raises UserError for a missing extra, an existing file or a disk without room, Refused for a model that torch.export
    cannot trace.
    """
    if type_name not in TYPES:
        raise UserError(f"ONNX type {type_name}, accepted: {', '.join(TYPES)}")
    refuse_without_extra()
    if path.exists():
        raise UserError(f"output {path} exists; name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) * _SPARE
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(f"output {path} needs {needed:,.0f} bytes, its disk has {free:,} free; make room")
    with tempfile.TemporaryDirectory(prefix=f".partial-{path.name}-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        _export(model, inputs, made)
        _quantise(made, TYPES[type_name])
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == made):  # the graph last
            os.replace(file, path.parent / file.name)


class CausalGraph(nn.Module):
    """A causal language model as a function of tensors alone: input ids, then keys and values layer by layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, past: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        present = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (out.logits, *present)


class _PlainGraph(nn.Module):
    """Any other model: logits, or hidden states."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        out = self.model(**dict(zip(self.names, tensors, strict=True)))
        return out.logits if "logits" in out else out[0]


def empty_cache(model: nn.Module, batch: int, length: int) -> list[torch.Tensor]:
    """Keys and values of zeros, (batch, KV heads, length, head size), of every layer of a causal language model."""
    with torch.no_grad():
        made = model(torch.zeros(1, 1, dtype=torch.int64), past_key_values=DynamicCache(), use_cache=True)
    pairs = [tensor for layer in made.past_key_values.layers for tensor in (layer.keys, layer.values)]
    return [tensor.new_zeros(batch, tensor.shape[1], length, tensor.shape[3]) for tensor in pairs]


def _export(model: nn.Module, inputs: Mapping[str, torch.Tensor] | None, path: Path) -> None:
    free = torch.export.Dim.DYNAMIC
    if inputs is None:
        past = empty_cache(model, 2, 3)
        ids = torch.arange(10).view(2, 5)
        layers = range(len(past) // 2)
        module, tensors = CausalGraph(model), (ids, past)
        shapes = {"input_ids": {0: free, 1: free}, "past": [{0: free, 2: free} for _ in past]}
        kinds = ("key", "value")
        names = ["input_ids", *(f"past.{n}.{kind}" for n in layers for kind in kinds)]
        renamed = {"output_names": ["logits", *(f"present.{n}.{kind}" for n in layers for kind in kinds)]}
    else:
        names, renamed = list(inputs), {}
        module = _PlainGraph(model, names)
        tensors = tuple(torch.cat([tensor, tensor]) for tensor in inputs.values())  # a batch of 1 would be a constant
        shapes = {"tensors": tuple({0: free, 1: free} if t.dim() == 2 else {0: free} for t in tensors)}
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(module.eval(), tensors, dynamic_shapes=shapes, strict=False)
            torch.onnx.export(
                program, (), str(path), dynamo=True, verbose=False, external_data=True, input_names=names, **renamed
            )
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror}; make room or name another disk") from None
    except Exception as error:  # whatever an exporter raises says that it cannot
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise Refused(
            f"{type(model).__name__} cannot be exported to ONNX ({type(error).__name__}: {(lines or [''])[0][:160]})"
        ) from error


def _quantise(path: Path, kind: GraphType) -> None:
    if kind.int8:
        _in_place(path, _to_int8)
    elif kind.bits is not None:
        _in_place(path, lambda source, target: _to_blocks(source, target, kind.bits))


def _in_place(path: Path, work: Callable[[Path, Path], None]) -> None:
    """`work` reads one file and writes another of the same name in a folder of its own."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        target = Path(folder) / path.name
        with _quiet():
            work(path, target)
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
        for file in Path(folder).iterdir():
            os.replace(file, path.parent / file.name)


def _to_int8(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=True)


def _to_blocks(source: Path, target: Path, bits: int) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(
        onnx.load(source),
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=4,
        bits=bits,
        op_types_to_quantize=("MatMul",),
    )
    made.process()
    onnx.save(made.model.model, target, save_as_external_data=True, location=f"{target.name}.data", size_threshold=1024)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters and quantizers warn about operators that no model here uses."""
    loud = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnxruntime", "")]
    levels = [one.level for one in loud]
    for one in loud:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loud, levels, strict=True):
            one.setLevel(level)
