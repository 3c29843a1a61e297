"""Buffers that are in no file, and ties that the stored values contradict: one model on every backend, or none."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests import tiny
from tests.checkpoints.test_inventory import with_tensors
from tests.conftest import save
from tests.family_cases import CASES, build
from tinygn_dist.backends.pieces import filled, hollow
from tinygn_dist.checkpoints import load
from tinygn_dist.checkpoints.sharded_load import from_checkpoint
from tinygn_dist.checkpoints.unstored import set_unstored_buffers, unstored_buffers
from tinygn_dist.config import ModelConfig
from tinygn_dist.errors import Refused

CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class BufferConfig(LlamaConfig):
    model_type = "with_buffer"

class BufferForCausalLM(LlamaForCausalLM):
    config_class = BufferConfig

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("table", {value}, persistent=False)

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + self.table.float().mean()
        return out
"""
VALUES = {
    "large": "torch.arange(500000.0).sin()",
    "small": "torch.tensor([2.0, 3.0])",
    "whole numbers": "torch.arange(1, 9)",
    "truth values": "torch.ones(4, dtype=torch.bool)",
    "scalar": "torch.tensor(5.0)",
}


@pytest.fixture
def with_buffer(tmp_path: Path) -> Iterator:
    def make(value: str) -> Path:
        folder = tmp_path / "model"
        save(tiny.build("llama"), folder)
        facts = json.loads((folder / "config.json").read_text())
        names = {"AutoConfig": "buffer_model.BufferConfig", "AutoModelForCausalLM": "buffer_model.BufferForCausalLM"}
        facts |= {"model_type": "with_buffer", "architectures": ["BufferForCausalLM"], "auto_map": names}
        (folder / "config.json").write_text(json.dumps(facts))
        (folder / "buffer_model.py").write_text(CODE.replace("{value}", value))
        return folder

    yield make
    for name in [name for name in sys.modules if "buffer_model" in name]:
        del sys.modules[name]


@pytest.mark.parametrize("kind", VALUES)
def test_buffers_of_custom_code_are_those_that_the_class_makes(kind: str, with_buffer, backend):
    folder, wanted = with_buffer(VALUES[kind]), eval(VALUES[kind])
    source = load.find_model(ModelConfig(name=str(folder), trust_remote_code=True))
    origin = from_checkpoint(source, backend)
    for model in (origin.take_whole(), filled(*origin.take_empty())):
        assert model.table.dtype == wanted.dtype and torch.equal(model.table, wanted)


@pytest.mark.parametrize(
    "value, part",
    [
        ("torch.randn(16)", "fills its buffer table at random and no file holds it"),
        ("torch.randperm(64)", "fills its buffer table at random"),
        ("self.lm_head.weight.sum(0)", "computes its buffer table from its weights"),
    ],
)
def test_buffers_that_cannot_be_known_are_refused(value: str, part: str, with_buffer, backend):
    source = load.find_model(ModelConfig(name=str(with_buffer(value)), trust_remote_code=True))
    origin = from_checkpoint(source, backend)
    for take in (origin.take_whole, origin.take_empty):
        with pytest.raises(Refused, match=part):
            take()


@pytest.mark.parametrize("family", [name for name in CASES if name not in ("resnet", "convnext")])
def test_buffers_of_stock_classes_are_as_they_were(family: str):
    """Bit by bit what from_pretrained gives."""
    model = build(family)
    before = {name: buffer.clone() for name, buffer in unstored_buffers(model).items()}
    set_unstored_buffers(model, lambda: type(model)._from_config(model.config))
    after = unstored_buffers(model)
    assert after.keys() == before.keys()
    for name, buffer in before.items():
        assert buffer.dtype == after[name].dtype and torch.equal(buffer, after[name]), name


def apart(model: torch.nn.Module, folder: Path, name: str, same: bool = False) -> Path:
    """config.json says tied, the file holds another head."""
    embedding = model.get_input_embeddings().weight.detach()
    head = embedding.clone() if same else embedding.flip(0).contiguous()
    return with_tensors(model, folder, {name: head}, tie_word_embeddings=True)


def _stock(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("same", [True, False])
def test_sharded_loading_keeps_apart_what_stock_loading_does(tmp_path: Path, backend, family: str, same: bool):
    folder = apart(tiny.build(family, tie_word_embeddings=True), tmp_path / "model", "lm_head.weight", same)
    source = load.find_model(ModelConfig(name=str(folder)))
    assert bool(source.apart) is not same
    origin, wanted = from_checkpoint(source, backend), _stock(folder)
    for model in (origin.take_whole(), filled(*origin.take_empty())):
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == same
        assert torch.equal(model.lm_head.weight, wanted.lm_head.weight)
    assert sum(p.numel() for p in load.skeleton(source).parameters()) == sum(p.numel() for p in wanted.parameters())


def test_t5_whose_head_is_its_own(tmp_path: Path, backend):
    """Its config always ties; the flag in config.json says whether outputs are scaled."""
    folder = apart(build("t5"), tmp_path / "model", "lm_head.weight")
    for flag in (True, False):
        facts = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": flag}
        facts.pop("scale_decoder_outputs", None)
        (folder / "config.json").write_text(json.dumps(facts))
        wanted = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        ids = torch.arange(3, 9)[None]
        origin = from_checkpoint(load.find_model(ModelConfig(name=str(folder))), backend)
        for model in (origin.take_whole(), filled(*origin.take_empty())):
            assert model.config.scale_decoder_outputs is flag
            with torch.no_grad():
                found = model(input_ids=ids, decoder_input_ids=ids).logits
                torch.testing.assert_close(found, wanted(input_ids=ids, decoder_input_ids=ids).logits)


def test_a_tied_model_stays_tied(tmp_path: Path):
    save(tiny.build("llama-tied"), tmp_path)
    source = load.find_model(ModelConfig(name=str(tmp_path)))
    assert not source.apart
    model = hollow(lambda: load.rebuild(source, source.config, torch.float32))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("task", ["seq2seq-lm", "image-classification"])
def test_a_task_that_the_class_does_not_have_is_told_in_one_line(saved_model, task: str):
    source = load.find_model(ModelConfig(name=str(saved_model("llama")), task=task))
    with pytest.raises(
        Refused, match=f"is a llama, which has no model for the task {task}; set model.task to causal-lm"
    ):
        load.skeleton(source)


@pytest.mark.parametrize(
    "model_type, tasks",
    [("gemma3", "causal-lm, sequence-classification, feature-extraction"), ("qwen2_5_vl", "feature-extraction")],
)
def test_a_vision_language_model_is_told_the_tasks_that_it_has(tmp_path: Path, model_type: str, tasks: str):
    """Of some families the whole model is their causal-lm, of others nothing but the features."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": ["Some"]}))
    with pytest.raises(Refused, match=f"is a Some, accepted tasks: {tasks};"):
        load.find_model(ModelConfig(name=str(tmp_path)))
