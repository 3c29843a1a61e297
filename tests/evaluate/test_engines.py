"""Engines: what is run is run, and what is only checked names the reason."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from tests.family_cases import build
from tinygn_dist.checkpoints.config_files import needed_versions, readers
from tinygn_dist.evaluate.engines import gguf_files, verdicts
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
    "sizes, allowed, part",
    [
        ({"intermediate_size": 1216}, "Q8_0, Q4_0", "Q4_K not: rows of 576, 1216 are no multiple of 256"),
        ({}, "BF16", "Q8_0 not: rows of 1228 are no multiple of 32"),
        ({"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}, "Q8_0, Q4_0, Q4_K", "llama"),
    ],
)
def test_formats_that_row_sizes_allow(sizes: dict, allowed: str, part: str):
    config = _llama(**sizes | {"num_key_value_heads": 1})
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    found = gguf_files(model, read_anatomy(model, needs_units=False))
    assert found.takes is None and f"{allowed};" in f"{found.why};" and part in found.why


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gpt2", "olmo2", "bert"])
def test_names_are_those_that_gguf_knows(family: str):
    model = build(family)
    found = gguf_files(model, read_anatomy(model, needs_units=False))
    assert (
        found.takes is None
        and f"every tensor has a name in architecture {family}" in found.why
        or "no name" in found.why
    )


def test_what_gguf_does_not_know_is_not_claimed():
    model = build("vit")
    found = gguf_files(model, read_anatomy(model, needs_units=False))
    assert found.takes is None and "no architecture of the package gguf is called vit" in found.why
    model = build("llama")
    model.v_head = torch.nn.Linear(4, 1)
    found = gguf_files(model, read_anatomy(model, needs_units=False))
    assert found.takes is None and "2 tensors have no name in architecture llama, such as v_head.weight" in found.why


def test_the_version_that_a_folder_needs(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": {"rope_theta": 1e6}}))
    assert readers(tmp_path) == ["needs transformers 5: config.json has rope_parameters and no rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e6}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    assert readers(tmp_path) == [
        "config.json has rope_theta beside rope_parameters, for transformers 4",
        "its tokenizer needs transformers 5, as the source's does",
    ]
    assert needed_versions(tmp_path) == ["its tokenizer needs transformers 5, as the source's does"]
    assert readers(tmp_path / "nowhere") == []
