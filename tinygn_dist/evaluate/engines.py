"""Which engines take a checkpoint, and why not.

Stock transformers, torch.export and ONNX Runtime are run on the folder. Of GGUF the tables of the package `gguf`
are asked, which llama.cpp keeps: names of tensors and row sizes of formats.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType
from gguf.tensor_mapping import get_tensor_name_map
from torch import nn

from tinygn_dist.checkpoints.config_files import readers
from tinygn_dist.models.anatomy import Anatomy

TOLERANCE = 1e-3
"""largest difference of an engine's outputs from transformers', relative to the largest output, that is rounding"""
_QUANTISED = ("Q8_0", "Q4_0", "Q4_K")
"""formats whose row sizes are looked up"""


class Verdict(NamedTuple):
    engine: str
    takes: bool | None
    """None: not known, because what would run it is not installed"""
    why: str


def verdicts(
    model: nn.Module, task: str, anatomy: Anatomy, inputs: dict[str, torch.Tensor], folder: str
) -> list[Verdict]:
    """One verdict per engine. model: as stock transformers loaded it from `folder`, in eval mode on the CPU; inputs: a
    batch of what it reads, (batch, ...) each."""
    with torch.no_grad():
        expected = _Outputs(model, tuple(inputs))(*inputs.values())
        exported, traced = _attempt("torch.export", lambda: _export(model, inputs, expected))
        onnx = _onnx(exported, inputs, expected)
    why = "; ".join([f"{type(model).__name__} loaded and ran with {transformers.__version__}", *readers(Path(folder))])
    stock = Verdict("transformers", bool(expected.isfinite().all()), why)
    return [stock, traced, onnx, gguf_files(model, anatomy)]


def gguf_files(model: nn.Module, anatomy: Anatomy) -> Verdict:
    """What the tables of the package `gguf` say: which names it knows for the architecture, and which formats the rows
    allow. Nothing is converted or run, so a checkpoint is refused or not known."""
    config = model.config
    names = {_letters(name): architecture for architecture, name in MODEL_ARCH_NAMES.items()}
    architecture = names.get(_letters(config.model_type.removesuffix("_text")))
    if architecture is None:
        return Verdict("GGUF", None, f"not tried: no architecture of the package gguf is called {config.model_type}")
    called, layers = MODEL_ARCH_NAMES[architecture], getattr(config, "num_hidden_layers", 0)
    known = get_tensor_name_map(architecture, layers)
    foreign = [name for name in model.state_dict() if known.get_name(name, (".weight", ".bias")) is None]
    if foreign:
        what = f"{len(foreign)} tensors have no name in architecture {called}, such as {foreign[0]}"
        return Verdict("GGUF", None, f"not tried: {what}")
    rows = sorted({matrix.shape[1] for matrix in anatomy.matrices})
    formats, reasons = ["F32", "F16", "BF16"], []
    for name in _QUANTISED:
        block = GGML_QUANT_SIZES[GGMLQuantizationType[name]][0]
        odd = [width for width in rows if width % block]
        if odd:
            reasons.append(f"{name} not: rows of {', '.join(map(str, odd))} are no multiple of {block}")
        else:
            formats.append(name)
    why = f"not run; every tensor has a name in architecture {called}; formats {', '.join(formats)}"
    return Verdict("GGUF", None, "; ".join([why, *reasons]))


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


class _Outputs(nn.Module):
    """A model as a function of its tensors that returns one tensor: logits, or hidden states."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        asked: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
        if hasattr(self.model.config, "use_cache"):
            asked["use_cache"] = False
        out = self.model(**asked)
        return out.logits if "logits" in out else out[0]


def _attempt(engine: str, work: Callable[[], tuple[Any, str]]) -> tuple[Any, Verdict]:
    """What `work` made (None when it failed), and the verdict."""
    try:
        with _quiet():
            made, why = work()
    except Exception as error:  # whatever an exporter raises is the answer
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return None, Verdict(engine, False, f"{type(error).__name__}: {(lines or [''])[0][:160]}")
    return made, Verdict(engine, True, why)


def _export(model: nn.Module, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> tuple[Any, str]:
    """The exported program, with free batch and sequence sizes where the model allows."""
    module, tensors = _Outputs(model, tuple(inputs)).eval(), tuple(inputs.values())
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    sizes = tuple(free if tensor.dim() == 2 else {0: torch.export.Dim.DYNAMIC} for tensor in tensors)
    twice = tuple(torch.cat([tensor, tensor]) for tensor in tensors)  # a batch of one would be taken for a constant
    try:
        program, shapes = (
            torch.export.export(module, twice, dynamic_shapes=(sizes,), strict=False),
            "any batch and length",
        )
    except Exception:
        program, shapes = torch.export.export(module, tensors, strict=False), f"shape {list(tensors[0].shape)} only"
    return program, f"runs, {shapes}; largest difference {_difference(program.module()(*tensors), expected):.1g}"


def _onnx(program: Any, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> Verdict:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if program is None:
        return Verdict("ONNX Runtime", False, "needs torch.export, which failed")
    if missing:
        return Verdict("ONNX Runtime", None, f"not tried: pip install {' '.join(missing)}")

    def run() -> tuple[None, str]:
        import onnxruntime  # an extra: only here

        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model.onnx")
            torch.onnx.export(program, tuple(inputs.values()), path, dynamo=True, verbose=False, external_data=True)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            fed = {
                asked.name: value.numpy() for asked, value in zip(session.get_inputs(), inputs.values(), strict=True)
            }
            found = torch.from_numpy(session.run(None, fed)[0])
        return None, f"{onnxruntime.__version__} runs on CPU; largest difference {_difference(found, expected):.1g}"

    return _attempt("ONNX Runtime", run)[1]


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the largest output; ValueError when it is more than rounding."""
    apart = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not apart <= TOLERANCE:
        raise ValueError(f"outputs differ from transformers' by {apart:.2g} of the largest")
    return apart


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about operators that no model here uses."""
    loud = logging.getLogger("torch.onnx")
    level = loud.level
    loud.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        loud.setLevel(level)
