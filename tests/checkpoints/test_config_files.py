"""config.json in the words of both transformers, generation_config.json as the source has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from tests import tiny
from tests.family_cases import build
from tinygn_dist.checkpoints.companions import companions_of
from tinygn_dist.checkpoints.config_files import write_config_files
from tinygn_dist.checkpoints.export import skeleton_of

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e5}


def written(model: torch.nn.Module, source: Path, out: Path) -> dict:
    out.mkdir()
    write_config_files(out, model, skeleton_of(model), torch.float32, companions_of(str(source)))
    assert type(model.config).from_pretrained(out).to_dict().keys() >= model.config.to_dict().keys() - {"dtype"}
    return json.loads((out / "config.json").read_text())


def source_of(model: torch.nn.Module, folder: Path, **entries: object) -> Path:
    model.config.save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "gemma2"])
@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1e6}, YARN])
def test_rope_in_both_dialects(family: str, rope: dict, tmp_path: Path):
    """transformers 4 reads the base from rope_theta, and falls back to 10,000."""
    model = tiny.build(family, rope_parameters=dict(rope))
    facts = written(model, source_of(model, tmp_path / "source"), tmp_path / "out")
    assert facts["rope_theta"] == rope["rope_theta"]
    scaling = facts.get("rope_scaling")
    assert (scaling is None) == (rope["rope_type"] == "default")
    if scaling:
        assert scaling["rope_type"] == "yarn" and scaling["factor"] == 4.0 and "rope_theta" not in scaling
    again = type(model.config).from_pretrained(tmp_path / "out")
    assert again.rope_parameters == model.config.rope_parameters


def test_rope_of_layer_types(tmp_path: Path):
    model = build("gemma3_text")
    facts = written(model, source_of(model, tmp_path / "source"), tmp_path / "out")
    rope = model.config.rope_parameters
    assert facts["rope_theta"] == rope["full_attention"]["rope_theta"]
    assert facts["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]
    assert type(model.config).from_pretrained(tmp_path / "out").rope_parameters == rope


def test_old_names_of_a_partial_rotation_stay(tmp_path: Path):
    model = build("gpt_neox")
    factor = model.config.rope_parameters["partial_rotary_factor"]
    folder = source_of(model, tmp_path / "source", rotary_pct=factor, rotary_emb_base=10000)
    facts = written(model, folder, tmp_path / "out")
    assert facts["rotary_pct"] == factor and facts["rotary_emb_base"] == 10000


def test_a_generation_config_that_says_the_same_keeps_its_bytes(tmp_path: Path):
    model = tiny.build("llama")
    folder = source_of(model, tmp_path / "source")
    text = '{"temperature": 0.6, "do_sample": true,\n "eos_token_id": [2, 3], "transformers_version": "4.40.0"}'
    (folder / "generation_config.json").write_text(text)
    model.generation_config = hf.GenerationConfig.from_pretrained(folder)
    written(model, folder, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == text
    model.generation_config.temperature = 0.7
    written(model, folder, tmp_path / "other")
    assert json.loads((tmp_path / "other" / "generation_config.json").read_text())["temperature"] == 0.7
