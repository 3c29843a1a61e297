"""Engines: what is run is run, and what is only checked names the reason."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers as hf

from tests.family_cases import build
from tinygn_dist.evaluate.engines import llama_cpp, verdicts, vllm
from tinygn_dist.models.anatomy import read_anatomy

INPUTS = {"input_ids": torch.arange(3, 15).view(1, 12), "attention_mask": torch.ones(1, 12, dtype=torch.int64)}


@pytest.mark.parametrize("model_type, task", [("llama", "causal-lm"), ("bert", "sequence-classification")])
def test_stock_transformers_and_torch_export_run(model_type: str, task: str, tmp_path: Path):
    build(model_type).save_pretrained(tmp_path)
    model = (hf.AutoModelForCausalLM if task == "causal-lm" else hf.AutoModelForSequenceClassification).from_pretrained(
        tmp_path
    )
    found = {
        v.engine: v for v in verdicts(model.eval(), task, read_anatomy(model, needs_units=False), INPUTS, tmp_path)
    }
    assert found["transformers"].takes and found["torch.export"].takes
    assert "any batch and length" in found["torch.export"].why
    installed = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    assert found["ONNX Runtime"].takes is (True if installed else None), found["ONNX Runtime"].why
    if not installed:
        assert "pip install" in found["ONNX Runtime"].why


def test_an_engine_that_computes_something_else_is_refused(monkeypatch):
    model = build("llama")
    program = type("Program", (), {"module": lambda self: lambda *tensors: torch.zeros(1, 12, 96)})()
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: program)
    found = verdicts(model, "causal-lm", read_anatomy(model, needs_units=False), INPUTS, "org/name")
    assert found[1].takes is False and "differ from transformers' by 1 of the largest" in found[1].why
    assert found[2].takes is False and "torch.export, which failed" in found[2].why


def _llama(**changes) -> hf.LlamaConfig:
    sizes = dict(hidden_size=576, intermediate_size=1228, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    return hf.LlamaConfig(**sizes | changes, architectures=["LlamaForCausalLM"], num_hidden_layers=2, vocab_size=64)


@pytest.mark.parametrize(
    "changes, takes, part",
    [
        ({}, True, "tensor parallel over 1"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, True, "tensor parallel over 1, 2"),
        ({"head_dim": 48}, False, "head size 48"),
        ({"num_key_value_heads": 2}, False, "9 heads are no multiple of 2 key/value heads"),
    ],
)
def test_vllm(changes: dict, takes: bool, part: str):
    found = vllm(_llama(**changes), "causal-lm", "org/name")
    assert found.takes is takes and part in found.why


def test_vllm_wants_a_known_architecture_and_safetensors(tmp_path: Path):
    config = _llama()
    config.architectures = ["ViTForImageClassification"]
    found = vllm(config, "image-classification", tmp_path)
    assert not found.takes and "model registry" in found.why and "no safetensors" in found.why


@pytest.mark.parametrize(
    "width, part",
    [
        (1216, "Q8_0, Q4_0; K-quants fall back to 32-blocks for rows of 576, 1216"),
        (1228, "rows of 1228 are no multiple"),
    ],
)
def test_llama_cpp_names_the_formats_that_row_sizes_allow(width: int, part: str):
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(_llama(intermediate_size=width))
    found = llama_cpp(model.config, "causal-lm", read_anatomy(model, needs_units=False))
    assert found.takes and part in found.why


def test_llama_cpp_says_what_it_does_not_run():
    model = build("vit")
    found = llama_cpp(model.config, "image-classification", read_anatomy(model, needs_units=False))
    assert not found.takes and "no architecture for model type vit" in found.why


@pytest.mark.parametrize(("widths", "uneven"), [([64, 64, 64, 64], False), ([64, 32, 16, 64], True)])
def test_a_width_for_each_layer(widths: list[int], uneven: bool):
    model = build("gemma3n_text", intermediate_size=widths, head_dim=64, num_kv_shared_layers=0)
    model.config.architectures = ["Gemma3nForCausalLM"]
    served = vllm(model.config, "causal-lm", "org/name")
    assert served.takes and ("a width for each layer" in served.why) == uneven
    found = llama_cpp(model.config, "causal-lm", read_anatomy(model, needs_units=False))
    assert found.takes is not uneven
    assert ("one feed-forward width for all layers, this model 16 to 64" in found.why) == uneven
    model.config.num_kv_shared_layers = 1
    shared = llama_cpp(model.config, "causal-lm", read_anatomy(model, needs_units=False))
    assert not shared.takes and "keys and values of layers that share" in shared.why


def test_a_config_that_says_head_sizes_layer_by_layer():
    config = hf.Gemma4TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        global_head_dim=16, num_key_value_heads=2, layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0, architectures=["Gemma4ForCausalLM"],
    )  # fmt: skip
    found = vllm(config, "causal-lm", "org/name")
    assert not found.takes and "head size 8" in found.why
