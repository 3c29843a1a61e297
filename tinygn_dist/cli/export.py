"""The verb `export`: a checkpoint folder, compressed by us or not, as a file that an engine runs."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch

from tinygn_dist.checkpoints import load
from tinygn_dist.checkpoints.formats import gguf, onnx
from tinygn_dist.checkpoints.formats.stored_weights import StoredWeights
from tinygn_dist.config import ModelConfig, make
from tinygn_dist.errors import Refused, UserError


class Format(NamedTuple):
    """types: the first is the default. write: returns a line about the file."""

    types: tuple[str, ...]
    ending: str
    write: Callable[[load.Source, Path, str], str]


def add_verb(verbs: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """The parser of `tinygn export`."""
    parser = verbs.add_parser("export", help="write a checkpoint as a file for llama.cpp (GGUF) or ONNX Runtime")
    parser.add_argument("model", help="hub id or folder with safetensors")
    parser.add_argument("--format", required=True, choices=sorted(FORMATS))
    types = "; ".join(f"{name}: {', '.join(row.types)}" for name, row in FORMATS.items())
    parser.add_argument("--type", help=f"how matrices are stored, the first by default ({types})")
    parser.add_argument(
        "--output", type=Path, help="file to write; by default FOLDER/NAME-TYPE with the format's ending"
    )
    parser.add_argument("--revision")
    parser.add_argument("--task", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true")
    return parser


def export(arguments: argparse.Namespace) -> int:
    """Write one file, and say what it is."""
    row = FORMATS[arguments.format]
    type_name = arguments.type or row.types[0]
    if type_name not in row.types:
        raise UserError(f"--type {type_name}, accepted for {arguments.format}: {', '.join(row.types)}")
    asked = {key: getattr(arguments, key) for key in ("revision", "task", "trust_remote_code")}
    source = load.find_model(make(ModelConfig, asked | {"name": arguments.model, "dequantize": True}))
    path = arguments.output or _default_path(source, type_name, row.ending)
    told = row.write(source, path.expanduser(), type_name)
    print(f"{path}: {path.stat().st_size:,} bytes, {told}")
    return 0


def _default_path(source: load.Source, type_name: str, ending: str) -> Path:
    name = Path(source.options.name).resolve().name if source.is_local else source.options.name.split("/")[-1]
    return (Path(source.path) if source.is_local else Path.cwd()) / f"{name}-{type_name}{ending}"


def _write_gguf(source: load.Source, path: Path, type_name: str) -> str:
    files = load.safetensors_files(source)
    if not files:
        raise Refused(f"{source.options.name} has no safetensors files; save it with save_pretrained first")
    if source.task != "causal-lm":
        raise Refused(f"{source.options.name} is for {source.task}, GGUF files are written of causal-lm; use onnx")
    name = Path(source.options.name).name
    described = gguf.Described(name, source.config, load.load_processor(source), source.apart)
    chosen = gguf.write_gguf(path, described, StoredWeights(files, source.codes), type_name)
    return ", ".join(f"{count} {kind}" for kind, count in Counter(chosen.values()).most_common())


def _write_onnx(source: load.Source, path: Path, type_name: str) -> str:
    onnx.refuse_without_extra()
    processor = load.load_processor(source)
    if source.task == "image-classification":
        inputs = processor(images=torch.zeros(3, 64, 64, dtype=torch.uint8), return_tensors="pt")
    else:
        inputs = processor(["A line of text, from which shapes are read."], return_tensors="pt")
    model = load.load_model(source).float()
    accepted = signature(model.forward).parameters
    tensors = {name: value for name, value in inputs.items() if name in accepted}
    onnx.write_onnx(path, model, None if source.task == "causal-lm" else tensors, type_name)
    return "with keys and values of earlier tokens" if source.task == "causal-lm" else f"reads {', '.join(tensors)}"


FORMATS: Mapping[str, Format] = {
    "gguf": Format(("Q8_0", *(name for name in gguf.TYPES if name != "Q8_0")), ".gguf", _write_gguf),
    "onnx": Format(tuple(onnx.TYPES), ".onnx", _write_onnx),
}
