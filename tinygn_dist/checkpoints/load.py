"""Model and tokenizer from a hub id, a local folder, a GGUF file or the embedded name. Nothing is sharded here.

Weights come from safetensors or a `weights_only` load; a pickle out of somebody's folder is never run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from tinygn_dist.checkpoints.formats.dequantised import Dequantised
from tinygn_dist.checkpoints.generation import mend_generation_config
from tinygn_dist.checkpoints.locate import explain, first_line, locate
from tinygn_dist.checkpoints.safetensors_io import StoredTensors
from tinygn_dist.checkpoints.unstored import keep_apart, set_unstored_buffers, stored_apart
from tinygn_dist.config import ModelConfig
from tinygn_dist.errors import Refused, UserError
from tinygn_dist.models.vgg import VggConfig, VggForImageClassification

_CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "feature-extraction": AutoModel,
}


AutoConfig.register(VggConfig.model_type, VggConfig)
AutoModelForImageClassification.register(VggConfig, VggForImageClassification)


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies and what it is, known before any weight is read."""

    path: str
    gguf_file: str | None
    config: PretrainedConfig
    task: str
    options: ModelConfig
    codes: Mapping[str, Any] | None = None
    """the `quantization_config` of a checkpoint whose codes are read as weights"""
    apart: tuple[str, ...] = ()
    """parameters that config.json ties to others and whose values in the files are their own"""

    @property
    def is_local(self) -> bool:
        """Whether nothing has to be downloaded first."""
        return Path(self.path).is_dir()

    @property
    def load_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"trust_remote_code": self.options.trust_remote_code}
        if self.options.revision:
            options["revision"] = self.options.revision
        if self.gguf_file:
            options["gguf_file"] = self.gguf_file
        return options


def find_model(options: ModelConfig) -> Source:
    """Locate a checkpoint, read its config and settle its task. Reads no weights.

    Raises UserError (missing, gated, broken, needs trust_remote_code) or Refused (already quantised, no such task).
    """
    path, gguf_file = locate(options.name)
    asked: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if options.revision:
        asked["revision"] = options.revision
    if gguf_file:
        asked["gguf_file"] = gguf_file
    try:
        config = AutoConfig.from_pretrained(path, **asked)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(explain(options.name, error)) from None
    codes = _codes_of(config, options.name, options.dequantize or bool(gguf_file))
    if getattr(config, "pruned_heads", None):
        raise Refused(
            f"{options.name} carries `pruned_heads`, which transformers 5 no longer loads; use the full checkpoint"
        )
    task = task_of(options, config)
    source = Source(path, gguf_file, config, task, options, None if gguf_file else codes)
    return source if gguf_file else _as_stored(source)


def _codes_of(config: PretrainedConfig, name: str, dequantize: bool) -> Mapping[str, Any] | None:
    """How a checkpoint is quantised, None where it is not. Its config no longer says so: the model will hold weights,
    and the mark would make the result unsavable. Raises Refused where weights are not asked for, or cannot be had."""
    quantised = getattr(config, "quantization_config", None)
    if not quantised:
        return None
    codes = dict(quantised if isinstance(quantised, dict) else quantised.to_dict())
    method = codes.get("quant_method", "unknown")
    if not dequantize:
        raise Refused(
            f"{name} is already quantised ({method}): packed integers cannot be scored as weights; compress the "
            "original checkpoint and quantise the result, or pass --model.dequantize true to start from what the "
            "codes stand for"
        )
    del config.quantization_config
    return codes


def stored_tensors(source: Source) -> StoredTensors | None:
    """What the checkpoint's safetensors files hold, codes as weights; None where it has none."""
    files = safetensors_files(source)
    if source.codes is not None:
        if not files:
            raise Refused(f"{source.options.name} is quantised and has no safetensors files; use another checkpoint")
        return Dequantised(files, source.codes)
    return StoredTensors(files) if files else None


def _as_stored(source: Source) -> Source:
    """With the names under which the files contradict a tie of the config."""
    text = source.config.get_text_config()
    if not (source.is_local and getattr(text, "tie_word_embeddings", False)):
        return source
    try:
        stored = stored_tensors(source)
        apart = stored_apart(source.config, lambda config: skeleton(source, config), stored) if stored else ()
    except (OSError, SafetensorError) as error:
        raise UserError(explain(source.options.name, error)) from None
    return replace(source, apart=apart)


def skeleton(source: Source, config: PretrainedConfig | None = None) -> nn.Module:
    """The model (or one of the same class with other sizes) on the meta device: structure and shapes without
    weights."""
    with torch.device("meta"):
        return _build(source, config)


def load_model(source: Source) -> nn.Module:
    """The model in eval mode on the CPU, dtype as asked.

    Raises UserError when weights are missing, unreadable, or contain NaN or inf (naming the tensor).
    """
    dtype = "auto" if source.options.dtype == "auto" else getattr(torch, source.options.dtype)
    if source.gguf_file and dtype == "auto":
        dtype = torch.float32
    try:
        model, info = _CLASSES[source.task].from_pretrained(
            source.path, dtype=dtype, output_loading_info=True, **source.load_options
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(explain(source.options.name, error)) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{source.options.name} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; "
            "set model.task to what the checkpoint was trained for"
        )
    if source.gguf_file:
        model = _without_gguf_mark(model, source)
    if source.apart:  # as from_pretrained has loaded it; from here on it stays so
        values = {name: model.get_parameter(name).detach() for name in source.apart}
        keep_apart(model, source.apart)
        for name, value in values.items():
            model.get_parameter(name).data = value
    set_unstored_buffers(model, lambda: _build(source, dtype=model.dtype))
    if getattr(model, "generation_config", None) is not None:
        mend_generation_config(model)
    refuse_nonfinite(dict(model.named_parameters()))
    return model.eval()


def safetensors_files(source: Source) -> list[Path]:
    """The checkpoint's safetensors files, downloaded where needed; none where it is stored otherwise."""
    revision = {"revision": source.options.revision} if source.options.revision else {}
    missing_is_fine = {"_raise_exceptions_for_missing_entries": False, **revision}
    try:
        index = cached_file(source.path, SAFE_WEIGHTS_INDEX_NAME, **missing_is_fine)
        if index:
            return _present(source, get_checkpoint_shard_files(source.path, index, **revision)[0])
        single = cached_file(source.path, SAFE_WEIGHTS_NAME, **missing_is_fine)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise UserError(explain(source.options.name, error)) from None
    return [Path(single)] if single else []


def _present(source: Source, files: Sequence[str]) -> list[Path]:
    missing = [Path(file).name for file in files if not Path(file).is_file()]
    if missing:
        raise UserError(
            f"model {source.options.name} cannot be loaded: its index names {missing[0]}, which is not there"
        )
    return [Path(file) for file in files]


def load_processor(source: Source) -> Any:
    """The tokenizer, or the image processor of an image model."""
    loader = AutoImageProcessor if source.task == "image-classification" else AutoTokenizer
    try:
        return loader.from_pretrained(source.path, **source.load_options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{source.options.name} has no readable tokenizer or processor: {first_line(error)}") from None


def refuse_nonfinite(tensors: Mapping[str, torch.Tensor]) -> None:
    """UserError naming the first weight that holds NaN or inf."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"weight {name} holds NaN or inf; the checkpoint is broken, use another one")


def asked_dtype(source: Source) -> torch.dtype | None:
    """The dtype the options or the checkpoint's config name; None when neither does."""
    if source.options.dtype != "auto":
        return getattr(torch, source.options.dtype)
    named = torch.float32 if source.gguf_file else getattr(source.config, "dtype", None)
    return getattr(torch, named) if isinstance(named, str) else named


def dtype_of(source: Source) -> torch.dtype:
    """The dtype the weights will have, as far as the config tells."""
    return asked_dtype(source) or torch.float32


def stored_bytes(skeleton: nn.Module, source: Source) -> int:
    """Bytes the checkpoint will take at most, from its skeleton."""
    width = torch.finfo(dtype_of(source)).bits // 8
    return sum(p.numel() for p in skeleton.parameters()) * width


def rebuild(source: Source, config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A model of the same class with other sizes; weights are still to be loaded."""
    return _build(source, config, dtype)


def _build(source: Source, config: PretrainedConfig | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    config = config or source.config
    try:
        model = _CLASSES[source.task].from_config(
            copy.deepcopy(config),
            trust_remote_code=source.options.trust_remote_code,
            **({"dtype": dtype} if dtype else {}),
        )
    except ImportError as error:
        raise UserError(explain(source.options.name, error)) from None
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise UserError(explain(source.options.name, error)) from None
        known = _tasks_of(config)
        accepted = (
            f"set model.task to {' or '.join(known)}" if known else f"its class fits none of {', '.join(_CLASSES)}"
        )
        raise Refused(
            f"{source.options.name} is a {config.model_type}, which has no model for the task {source.task}; {accepted}"
        ) from None
    return keep_apart(model, source.apart)


def task_of(options: ModelConfig, config: PretrainedConfig) -> str:
    """The asked task, or the one the checkpoint's `architectures` name. Raises Refused for one that is not known."""
    named = (getattr(config, "architectures", None) or [""])[0]
    two_stacks = type(config) in AutoModelForSeq2SeqLM._model_mapping and config.is_encoder_decoder
    if two_stacks and (options.task in ("causal-lm", "feature-extraction") or named.endswith("EncoderModel")):
        raise Refused(
            f"{options.name} is an encoder-decoder ({named or config.model_type}), accepted: model.task seq2seq-lm or "
            "sequence-classification, of a checkpoint with both halves"
        )
    if options.task != "auto":
        return options.task
    if two_stacks and not named.endswith("ForSequenceClassification"):
        return "seq2seq-lm"
    for ending, task in (
        ("ForCausalLM", "causal-lm"),
        ("LMHeadModel", "causal-lm"),
        ("ForSequenceClassification", "sequence-classification"),
        ("ForImageClassification", "image-classification"),
        ("Model", "feature-extraction"),
    ):
        if named.endswith(ending):
            return task
    if type(config) in AutoModelForCausalLM._model_mapping and not named:
        return "causal-lm"
    accepted = ", ".join(_tasks_of(config) or _CLASSES)
    raise Refused(f"{options.name} is a {named or config.model_type}, accepted tasks: {accepted}; set model.task")


def _tasks_of(config: PretrainedConfig) -> list[str]:
    """For which transformers has a class of this config."""
    return [task for task, auto in _CLASSES.items() if type(config) in auto._model_mapping]


def _without_gguf_mark(model: nn.Module, source: Source) -> nn.Module:
    """transformers marks dequantised GGUF models as quantised, and then refuses to save them: rebuild from the clean
    config (same class, same tensors, tied as before)."""
    clean = _build(source, dtype=model.dtype)
    clean.load_state_dict(model.state_dict(), strict=True)
    clean.tie_weights()
    clean.generation_config = model.generation_config
    return clean
