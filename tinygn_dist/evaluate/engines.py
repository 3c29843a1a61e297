"""Which engines take a checkpoint, and why not.

Stock transformers, torch.export and ONNX Runtime are really run on the folder; vLLM and llama.cpp live elsewhere, so the
folder is held against what their loaders ask for (architecture, head sizes, divisible heads, row sizes of quantised
formats). Sources: vLLM's model registry and attention backends, llama.cpp's convert_hf_to_gguf and llama-quantize.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gguf.constants import MODEL_ARCH_NAMES
from torch import nn
from transformers import PretrainedConfig

from tinygn_dist.models.anatomy import Anatomy

TOLERANCE = 1e-3
"""largest difference of an engine's outputs from transformers', relative to the largest output, that is rounding"""
_VLLM = frozenset(
    [
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3nForCausalLM",
        "SmolLM3ForCausalLM",
        "GraniteForCausalLM",
        "Olmo2ForCausalLM",
        "PhiForCausalLM",
        "Phi3ForCausalLM",
        "GPT2LMHeadModel",
        "GPTNeoXForCausalLM",
        "BloomForCausalLM",
        "FalconForCausalLM",
        "OPTForCausalLM",
        "MixtralForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "OlmoeForCausalLM",
        "GptOssForCausalLM",
        "BertModel",
        "RobertaModel",
        "XLMRobertaModel",
        "BertForSequenceClassification",
        "RobertaForSequenceClassification",
        "XLMRobertaForSequenceClassification",
    ]
)
_VLLM_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_LLAMA_CPP = {  # model_type -> name of the architecture in GGUF files
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "smollm3": "smollm3", "granite": "granite",
    "qwen2": "qwen2", "qwen3": "qwen3", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "gemma3n_text": "gemma3n", "olmo2": "olmo2",
    "olmoe": "olmoe", "phi": "phi2", "phi3": "phi3",
    "gpt2": "gpt2", "gpt_neox": "gptneox", "bloom": "bloom", "falcon": "falcon", "gpt_oss": "gpt-oss", "bert": "bert",
    "roberta": "bert", "xlm-roberta": "bert",
}  # fmt: skip
_LLAMA_CPP_TASKS = ("causal-lm", "feature-extraction")


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
        exported, told = _attempt("torch.export", lambda: _export(model, inputs, expected))
        onnx = _onnx(exported, inputs, expected)
    stock = Verdict("transformers", bool(expected.isfinite().all()), f"{type(model).__name__} loaded and ran")
    return [stock, told, onnx, vllm(model.config, task, folder), llama_cpp(model.config, task, anatomy)]


def vllm(config: PretrainedConfig, task: str, folder: str) -> Verdict:
    """Whether vLLM's loaders would take a checkpoint of this config."""
    bad, (architecture,) = [], (config.architectures or [""])[:1]
    if architecture not in _VLLM:
        bad.append(f"{architecture or 'no architecture in config.json'} is not in its model registry")
    bad += _uneven_heads(config)
    head = _head_dim(config)
    if head and task == "causal-lm" and head not in _VLLM_HEAD_SIZES:
        bad.append(f"head size {head}, its attention kernels have {', '.join(map(str, _VLLM_HEAD_SIZES))}")
    if Path(folder).is_dir() and not any(Path(folder).glob("*.safetensors")):
        bad.append("no safetensors in the folder")
    heads, groups = _heads(config)
    ways = [n for n in (2, 4, 8) if heads and heads % n == 0 and (groups % n == 0 or n % groups == 0)]
    split = f"; tensor parallel over 1{''.join(f', {n}' for n in ways)}" if heads else ""
    sizes = "a width for each layer, which its class reads" if len(_widths(config)) > 1 else "uniform sizes"
    return Verdict("vLLM", not bad, "; ".join(bad) or f"known architecture, {sizes}, standard names{split}")


def llama_cpp(config: PretrainedConfig, task: str, anatomy: Anatomy) -> Verdict:
    """Whether llama.cpp's converter would take it, and which quantised formats its row sizes allow."""
    name, bad = _LLAMA_CPP.get(config.model_type), []
    if name not in MODEL_ARCH_NAMES.values():
        bad.append(f"its converter has no architecture for model type {config.model_type}")
    if task not in _LLAMA_CPP_TASKS:
        bad.append(f"it runs language and embedding models, not {task}")
    bad += _uneven_heads(config)
    if len(widths := _widths(config)) > 1:
        bad.append(f"its loader has one feed-forward width for all layers, this model {min(widths)} to {max(widths)}")
    if getattr(config, "num_kv_shared_layers", 0):
        bad.append(
            "its loader asks for keys and values of layers that share those of others, which transformers does not write"
        )
    rows = sorted({matrix.shape[1] for matrix in anatomy.matrices})
    odd = [width for width in rows if width % 32]
    coarse = [width for width in rows if width % 256]
    why = f"as {name}; formats F32, F16, BF16{'' if odd else ', Q8_0, Q4_0'}{'' if coarse else ', K-quants'}"
    if odd:
        why += f" (rows of {', '.join(map(str, odd))} are no multiple of 32)"
    elif coarse:
        why += f"; K-quants fall back to 32-blocks for rows of {', '.join(map(str, coarse))} (no multiple of 256)"
    return Verdict("llama.cpp", not bad, "; ".join(bad) or why)


def _heads(config: PretrainedConfig) -> tuple[int, int]:
    heads = getattr(config, "num_attention_heads", None) or 0
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _head_dim(config: PretrainedConfig) -> int:
    """Of the first layer, where the config says it layer by layer (Gemma 4)."""
    heads, _ = _heads(config)
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[0]
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)


def _widths(config: PretrainedConfig) -> set[int]:
    """Of its layers, where the config has a list of them."""
    widths = getattr(config, "intermediate_size", None)
    return set(widths) if isinstance(widths, list | tuple) else set()


def _uneven_heads(config: PretrainedConfig) -> list[str]:
    heads, groups = _heads(config)
    return [f"{heads} heads are no multiple of {groups} key/value heads"] if groups and heads % groups else []


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
            fed = {told.name: value.numpy() for told, value in zip(session.get_inputs(), inputs.values(), strict=True)}
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
