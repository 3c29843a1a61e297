"""GGUF: one file that llama.cpp runs, written tensor by tensor from a checkpoint folder.

Matrices take the type that is asked for; codes that lie in the folder go in as they are wherever a type holds them.
Layers of different widths make an architecture `deci`, whose widths and heads are lists. Source: the package `gguf` and
llama.cpp's loaders.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Number
from gguf import LlamaFileType as FileType
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tinygn_dist.checkpoints.formats.gguf_codes import pack_codes, type_of_codes
from tinygn_dist.checkpoints.formats.gguf_names import ARCHITECTURES, UNEVEN, Architecture, gguf_name, row_order
from tinygn_dist.checkpoints.formats.gguf_rope import add_rope, frequency_factors
from tinygn_dist.checkpoints.formats.gguf_tokenizer import add_tokenizer, read_vocabulary
from tinygn_dist.checkpoints.formats.k_quants import q4_k, q6_k
from tinygn_dist.checkpoints.formats.stored_weights import Weights
from tinygn_dist.errors import Refused, UserError

_SPARE = 1.02
_ENDS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class TensorType:
    """otherwise: for rows that are not whole blocks. ends: for the embedding and the output matrix."""

    file_type: FileType
    otherwise: str
    ends: str
    encode: Callable[[torch.Tensor], torch.Tensor] | None = None
    """where the package `gguf` does not write it"""


TYPES: Mapping[str, TensorType] = {
    "F32": TensorType(FileType.ALL_F32, "F32", "F32"),
    "F16": TensorType(FileType.MOSTLY_F16, "F16", "F16"),
    "BF16": TensorType(FileType.MOSTLY_BF16, "BF16", "BF16"),
    "Q8_0": TensorType(FileType.MOSTLY_Q8_0, "F16", "Q8_0"),
    "Q6_K": TensorType(FileType.MOSTLY_Q6_K, "Q8_0", "Q6_K", q6_k),
    "Q5_1": TensorType(FileType.MOSTLY_Q5_1, "F16", "Q6_K"),
    "Q5_0": TensorType(FileType.MOSTLY_Q5_0, "F16", "Q6_K"),
    "Q4_K": TensorType(FileType.MOSTLY_Q4_K_S, "Q5_0", "Q6_K", q4_k),
    "Q4_1": TensorType(FileType.MOSTLY_Q4_1, "F16", "Q6_K"),
    "Q4_0": TensorType(FileType.MOSTLY_Q4_0, "F16", "Q6_K"),
    "MXFP4": TensorType(FileType.MOSTLY_MXFP4_MOE, "F16", "Q8_0"),
}


@dataclass(frozen=True)
class Described:
    """What is known of a checkpoint beside its weights. apart: names that the config ties and the files do not."""

    name: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    apart: Sequence[str] = ()


@dataclass(frozen=True)
class _Layers:
    """Widths of each layer, read from the shapes of its weights."""

    widths: Sequence[int]
    heads: Sequence[int]
    kv_heads: Sequence[int]
    head_dim: int

    @property
    def even(self) -> bool:
        return all(len(set(one)) == 1 for one in (self.widths, self.heads, self.kv_heads))


def write_gguf(path: Path, described: Described, weights: Weights, type_name: str) -> dict[str, str]:
    """The type of each tensor by its GGUF name. type_name: of TYPES.

    Written under another name and renamed when complete. Raises Refused for an architecture or a tokenizer that the
    file cannot carry, UserError for an existing file or a disk without room, all before weights are read; UserError
    when the disk fills up.
    """
    if type_name not in TYPES:
        raise UserError(f"GGUF type {type_name}, accepted: {', '.join(TYPES)}")
    if path.exists():
        raise UserError(f"output {path} exists; name another file")
    config = described.config
    vocabulary = read_vocabulary(described.tokenizer, config.vocab_size)
    layers = _read_layers(config, weights)
    architecture = _architecture(config, layers)
    places = _places(described, weights)
    chosen = {place: _type_of(place, name, weights, type_name) for place, name in places.items()}
    sizes = {place: _byte_shape(weights.shape(name), chosen[place]) for place, name in places.items()}
    _refuse_full_disk(path, sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in sizes.values()))

    partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
    writer = gguf.GGUFWriter(partial, architecture.name)
    _add_metadata(writer, described, layers, TYPES[type_name].file_type)
    add_tokenizer(writer, vocabulary, described.tokenizer)
    factors = frequency_factors(config, layers.head_dim)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for place, (shape, dtype) in sizes.items():
        nbytes = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(place, shape, dtype, nbytes, raw_dtype=Number[chosen[place]])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for place, name in places.items():
            order = row_order(name, weights.shape(name)[0], layers.head_dim) if architecture.interleaved else None
            writer.write_tensor_data(_encoded(weights, name, chosen[place], order))
        writer.close()
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror}; make room or name another disk") from None
    finally:
        partial.unlink(missing_ok=True)
    return chosen


def _architecture(config: PretrainedConfig, layers: _Layers) -> Architecture:
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise Refused(
            f"GGUF files of {config.model_type} are not written here, accepted: {', '.join(ARCHITECTURES)}; "
            "use --format onnx"
        )
    if config.hidden_act != "silu":
        raise Refused(f"llama.cpp runs {config.model_type} with silu, this checkpoint has {config.hidden_act}")
    if layers.even:
        return known
    if not known.can_be_uneven:
        raise Refused(
            f"layers of {config.model_type} differ in width, and llama.cpp's architecture for that ({UNEVEN}) has no "
            "norms of q and k; use --format onnx, or compress with --prune.uneven false"
        )
    return Architecture(UNEVEN, interleaved=True, can_be_uneven=True)


def _read_layers(config: PretrainedConfig, weights: Weights) -> _Layers:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    names = set(weights.names)
    rows = []
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        wanted = [f"{layer}.{one}.weight" for one in ("mlp.gate_proj", "self_attn.q_proj", "self_attn.k_proj")]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise Refused(f"the checkpoint has no {missing[0]}, which a GGUF file of {config.model_type} needs")
        rows.append([weights.shape(name)[0] for name in wanted])
    widths, queries, keys = zip(*rows, strict=True)
    return _Layers(widths, [n // head_dim for n in queries], [n // head_dim for n in keys], head_dim)


def _places(described: Described, weights: Weights) -> dict[str, str]:
    """Names of the checkpoint by names in the file, in the order of the file."""
    places, config = {}, described.config
    tied = config.tie_word_embeddings and "lm_head.weight" not in described.apart
    for name in weights.names:
        place = gguf_name(name)
        if place is None:
            raise Refused(f"{name} has no place in a GGUF file of {config.model_type}; use --format onnx")
        if place != "output.weight" or not tied:
            places[place] = name
    if "output.weight" not in places and not tied:
        raise Refused("the checkpoint has no lm_head.weight and config.json does not tie it to the embedding")
    return dict(sorted(places.items(), key=lambda item: ("blk" in item[0], _natural(item[0]))))


def _natural(place: str) -> tuple[int, str]:
    pieces = place.split(".")
    return (int(pieces[1]) if pieces[1].isdigit() else 0, place)


def _type_of(place: str, name: str, weights: Weights, type_name: str) -> str:
    shape = weights.shape(name)
    if len(shape) < 2:
        return "F32"
    codes = weights.codes(name)
    if codes is not None and type_name.startswith("Q") and (held := type_of_codes(codes)):
        return held
    chosen = TYPES[type_name].ends if place in _ENDS else type_name
    while shape[-1] % gguf.GGML_QUANT_SIZES[Number[chosen]][0]:
        chosen = TYPES[chosen].otherwise
    return chosen


def _byte_shape(shape: Sequence[int], type_name: str) -> tuple[tuple[int, ...], np.dtype]:
    if type_name in ("F32", "F16"):
        return tuple(shape), np.dtype(np.float32 if type_name == "F32" else np.float16)
    return gguf.quant_shape_to_byte_shape(shape, Number[type_name]), np.dtype(np.uint8)


def _encoded(weights: Weights, name: str, type_name: str, order: torch.Tensor | None) -> np.ndarray:
    """order: of the rows, None where they stay."""
    codes = weights.codes(name) if type_name.startswith("Q") else None
    if codes is not None and type_of_codes(codes) == type_name:
        if order is not None:
            codes = type(codes)(*(each[order] for each in codes))
        return pack_codes(codes, type_name).numpy()
    values = weights.dense(name).float()
    if order is not None:
        values = values[order]
    encode = TYPES[type_name].encode
    if encode is not None:
        return encode(values).numpy()
    return gguf.quants.quantize(np.ascontiguousarray(values.numpy()), Number[type_name])


def _add_metadata(writer: gguf.GGUFWriter, described: Described, layers: _Layers, file_type: FileType) -> None:
    config = described.config
    writer.add_type("model")
    writer.add_name(described.name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(window, config.max_position_embeddings))  # llama.cpp has no window here
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(layers.widths[0] if layers.even else list(layers.widths))
    writer.add_head_count(layers.heads[0] if layers.even else list(layers.heads))
    writer.add_head_count_kv(layers.kv_heads[0] if layers.even else list(layers.kv_heads))
    writer.add_key_length(layers.head_dim)
    writer.add_value_length(layers.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_rope(writer, config, layers.head_dim)


def _refuse_full_disk(path: Path, num_bytes: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror}") from None
    if free < num_bytes * _SPARE:
        raise UserError(
            f"output {path} needs {num_bytes:,} bytes, its disk has {free:,} free; make room or name another disk"
        )
