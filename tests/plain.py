"""References written in plain torch, without the product: zeroed columns, deleted layers, losses in float64."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests import tiny
from tinygn_dist.backends.base import Backend
from tinygn_dist.models.objective import Batch, Losses

LAYERS = {  # where each family keeps its layers, and what its config calls their number
    "llama": ("model.layers", "num_hidden_layers"),
    "llama-tied": ("model.layers", "num_hidden_layers"),
    "qwen2": ("model.layers", "num_hidden_layers"),
    "qwen3": ("model.layers", "num_hidden_layers"),
    "gemma2": ("model.layers", "num_hidden_layers"),
    "gpt2": ("transformer.h", "n_layer"),
    "opt": ("model.decoder.layers", "num_hidden_layers"),
    "bert": ("encoder.layer", "num_hidden_layers"),
    "bert-classifier": ("bert.encoder.layer", "num_hidden_layers"),
    "vit": ("vit.layers", "num_hidden_layers"),
}
DOWN = {  # the linear that reads the FFN's channels
    **dict.fromkeys(("llama", "llama-tied", "qwen2", "qwen3", "gemma2"), "mlp.down_proj"),
    "gpt2": "mlp.c_proj",
    "opt": "fc2",
    "bert": "output.dense",
    "bert-classifier": "output.dense",
    "vit": "mlp.fc2",
}
WITH_CACHE = {f"{name}ForCausalLM" for name in ("Llama", "Qwen2", "Qwen3", "Gemma2", "OPT")} | {"GPT2LMHeadModel"}
O_PROJ = "self_attn.o_proj"


def columns_of(model: nn.Module, family: str, layer: int, kind: str) -> torch.Tensor:
    """The (out, in) weight, as a view, whose input features the units of a layer feed."""
    name = DOWN[family] if kind == "channels" else O_PROJ
    module = model.get_submodule(f"{LAYERS[family][0]}.{layer}.{name}")
    return module.weight.data.t() if isinstance(module, Conv1D) else module.weight.data


def head_width(model: nn.Module) -> int:
    """Features of one KV group at the input of o_proj."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim * config.num_attention_heads // config.num_key_value_heads


def without_units(model: nn.Module, family: str, kind: str, gone: dict[int, list[int]]) -> nn.Module:
    """A copy in which some units of some layers feed nothing."""
    changed, width = copy.deepcopy(model), head_width(model) if kind == "heads" and gone else 1
    for layer, units in gone.items():
        columns_of(changed, family, layer, kind)[:, tiny.positions(units, width)] = 0
    return changed


def without_layers(model: nn.Module, family: str, gone: list[int]) -> nn.Module:
    """A new, shorter model with the remaining layers' weights."""
    path, depth = LAYERS[family]
    config, total = copy.deepcopy(model.config), getattr(model.config, depth)
    kept = [layer for layer in range(total) if layer not in gone]
    setattr(config, depth, len(kept))
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    short, state = type(model)(config), {}
    for name, tensor in model.state_dict().items():
        found = re.match(rf"{re.escape(path)}\.(\d+)\.(.*)", name)
        if not found:
            state[name] = tensor
        elif int(found[1]) in kept:
            state[f"{path}.{kept.index(int(found[1]))}.{found[2]}"] = tensor
    short.load_state_dict(state)
    return short.to(next(model.parameters()).dtype).eval()


def hidden(output: Any) -> torch.Tensor:
    """The hidden states that a layer returns, alone or at the head of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def forward(model: nn.Module, batch: Batch) -> Any:
    """The model's output, computed without a KV cache."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "reference")}
    return model(**inputs, **({"use_cache": False} if type(model).__name__ in WITH_CACHE else {}))


def loss(model: nn.Module, batch: Batch, family: str) -> Losses:
    """Summed loss per sequence, in float64 from the logits on."""
    output = forward(model, batch)
    if family == "bert":
        away = (output.last_hidden_state - batch["reference"]).double().square().sum(-1)
        losses = away / batch["reference"].double().square().sum(-1)
        return Losses((losses * batch["attention_mask"]).sum(1), batch["attention_mask"].sum(1))
    logits, labels = output.logits.double(), batch["labels"]
    if family in tiny.CAUSAL:
        logits, labels = logits[:, :-1], labels[:, 1:]
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        return Losses(each.sum(1), (labels != -100).sum(1))
    return Losses(F.cross_entropy(logits, labels, reduction="none"), torch.ones_like(labels))


def total_losses(model: nn.Module, batches: list[Batch], family: str) -> torch.Tensor:
    """(sequences,) summed losses over all batches."""
    with torch.no_grad():
        return torch.cat([loss(model, batch, family).total for batch in batches])


def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The model's output at real tokens."""
    with torch.no_grad():
        output = forward(model, batch)
    values = output.logits if "logits" in output else output.last_hidden_state
    return values[batch["attention_mask"].bool()] if values.dim() == 3 and "attention_mask" in batch else values


def full_state(backend: Backend, model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all whole tensors on every rank; tied ones under one name. A collective."""
    return {name: tensor.detach().cpu().clone() for name, tensor in backend.full_tensors(model)}
