"""Runs on checkpoints that hold more than the model: the result holds it too, or says that it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.checkpoints.test_inventory import HEAD, MTP, with_tensors
from tests.checkpoints.test_unstored import apart
from tests.pipeline.conftest import report_of
from tests.pipeline.test_end_to_end import PATTERNS, stored


@pytest.mark.parametrize("pattern", ["unstructured", "channels"])
def test_a_value_head_and_prediction_layers(compress, tinygn, tmp_path: Path, pattern: str):
    extra = {**HEAD, **MTP}
    folder = with_tensors(tiny.build("llama"), tmp_path / "model", extra, num_nextn_predict_layers=1)
    out = tmp_path / "out"
    done = compress(folder, out, *PATTERNS[pattern])
    assert done.code == 0, done.err
    found, report = stored(out), report_of(out)
    carried = extra if pattern == "unstructured" else HEAD
    for name in extra:
        assert (name in found) == (name in carried), name
    for name, tensor in carried.items():
        assert torch.equal(found[name], tensor), name
    model = sum(tensor.numel() for name, tensor in found.items() if name not in extra)
    assert report["after"]["num_params"] == model
    facts = json.loads((out / "config.json").read_text())
    assert facts["num_nextn_predict_layers"] == int(pattern == "unstructured")
    assert any("v_head.summary.bias" in note for note in report["notes"])
    figures = json.loads(tinygn("evaluate", out, "--json", "--no-latency").out)
    assert figures["perplexity"] == pytest.approx(report["after"]["perplexity"], rel=1e-6)


@pytest.mark.parametrize("pattern", ["unstructured", "channels", "layers"])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "qwen3"])
def test_values_that_a_tie_contradicts_are_kept_apart(compress, tmp_path: Path, family: str, pattern: str):
    """As stock loading does: in every way to remove, and in the result's files, which then say so."""
    folder = apart(tiny.build(family, tie_word_embeddings=True), tmp_path / "model", "lm_head.weight")
    wanted = load_file(folder / "model.safetensors")["lm_head.weight"]
    done = compress(folder, tmp_path / "out", *PATTERNS[pattern])
    assert done.code == 0, done.err
    assert torch.equal(stored(tmp_path / "out")["lm_head.weight"], wanted)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, wanted)
    assert not torch.equal(again.lm_head.weight, again.get_input_embeddings().weight)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    report = json.loads((tmp_path / "out" / "tinygn_report.json").read_text())
    assert report["before"]["num_params"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()
    )
