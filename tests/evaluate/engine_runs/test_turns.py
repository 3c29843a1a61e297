"""Engines run a tiny checkpoint; their log-probabilities are those of torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from tests.checkpoints.formats import gguf_cases
from tinygn_dist.checkpoints.formats.gguf import Described, write_gguf
from tinygn_dist.checkpoints.formats.stored_weights import StoredWeights
from tinygn_dist.errors import UserError
from tinygn_dist.evaluate.engine_runs import llama_cpp, turns

IDS = list(range(10, 22))


def expected(model: torch.nn.Module) -> list[dict[int, float]]:
    with torch.no_grad():
        found = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    return [dict(enumerate(row.tolist())) for row in found]


def test_transformers_agrees_with_the_model_in_memory(tmp_path: Path):
    model = gguf_cases.model()
    model.save_pretrained(tmp_path)
    (found,) = turns.measure("transformers", [tmp_path], IDS, [16], 1)
    assert turns.largest_difference(found.log_probs, expected(model)) < 1e-4
    assert found.num_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert found.timings[16].prefill > 0 and found.timings[16].decode > 0 and found.resident_mib > 50


@pytest.mark.parametrize("kind", ["qwen2-uneven"])
def test_llama_cpp_runs_what_was_written(tmp_path: Path, kind: str):
    pytest.importorskip("xllamacpp", reason=f"run: {llama_cpp.INSTALL}")
    model = gguf_cases.model(kind.split("-")[0])
    if kind.endswith("uneven"):
        gguf_cases.make_uneven(model, (96, 32, 64), (2, 1, 2))
    folder, path = gguf_cases.save(model, tmp_path), tmp_path / "m.gguf"
    described = Described("tiny", AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    write_gguf(path, described, StoredWeights(folder.glob("*.safetensors"), None), "F32")
    (found,) = turns.measure("llama.cpp", [folder], IDS, [], 1)
    assert turns.largest_difference(found.log_probs, expected(model)) < 0.01


def test_what_is_missing_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="accepted: transformers"):
        turns.row_of("vllm")
    with pytest.raises(UserError, match="tinygn export"):
        llama_cpp.find_file(tmp_path)


def test_a_token_that_neither_engine_expects_is_no_agreement():
    assert turns.largest_difference([{1: -0.5, 2: -1.0}], [{1: -0.6, 3: -1.0}]) == pytest.approx(0.1)
    assert turns.largest_difference([{1: -0.5}], [{2: -0.5}]) == float("inf")
