"""Weights on a grid, from the request to the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.conftest import save
from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints import load
from tinygn_dist.checkpoints.safetensors_io import StoredTensors
from tinygn_dist.checkpoints.sharded_load import placed
from tinygn_dist.config import Config, ModelConfig, load_config
from tinygn_dist.errors import UserError
from tinygn_dist.pipeline import compress

SMALL = {"num_samples": 6, "seq_len": 32, "eval_samples": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole groups of 32."""
    model = tiny.build("llama-tied", hidden_size=64, intermediate_size=96)
    return save(model.bfloat16(), tmp_path_factory.mktemp("model"))


@pytest.fixture
def asked(folder: Path, text_file: Path, tmp_path: Path) -> Callable[..., Config]:
    def config(**sections: Any) -> Config:
        return Config(
            **{
                "model": {"name": str(folder)},
                "data": {"name": str(text_file), **SMALL},
                "evaluate": {"latency": False},
                "output": {"dir": str(tmp_path / "out")},
            }
            | sections
        )

    return config


def weights_of(folder: Path, backend: Backend) -> dict[str, torch.Tensor]:
    model, _ = placed(load.find_model(ModelConfig(name=str(folder), dequantize=True)), backend)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("scheme", "ending", "size"),
    [("int4", "weight_packed", 4.625), ("int8-dynamic", "weight", 8.25), ("fp8", "weight", 8.25)],
)
def test_files_hold_codes_and_load_as_weights(
    scheme: str, ending: str, size: float, asked: Callable, folder: Path, tmp_path: Path, backend: Backend
):
    more = {"group_size": 32} if scheme == "int4" else {}
    report = compress(asked(quantize={"scheme": scheme, **more}))
    stored = StoredTensors(sorted((tmp_path / "out").glob("*.safetensors")))
    name = "model.layers.1.mlp.down_proj"
    assert f"{name}.{ending}" in stored.names and f"{name}.weight_scale" in stored.names
    facts = report.quantization
    assert facts["scheme"] == scheme and facts["matrices"] == 21
    assert report.after["num_params"] == report.before["num_params"] and report.after["bytes"] < report.before["bytes"]
    before, after = weights_of(folder, backend), weights_of(tmp_path / "out", backend)
    assert before.keys() == after.keys()
    inside = [name for name in before if ".layers." in name and "proj" in name]
    assert facts["weights"] == sum(before[name].numel() for name in inside)
    assert facts["bits_per_weight"] == pytest.approx(size, abs=0.2)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) is (key not in inside)
        assert after[key].dtype == torch.bfloat16
    assert report.after["perplexity"] == pytest.approx(report.before["perplexity"], rel=0.05)


def test_transformers_loads_the_files_as_they_are(asked: Callable, tmp_path: Path, backend: Backend):
    pytest.importorskip("compressed_tensors")
    compress(asked(quantize={"scheme": "int3", "group_size": 32}))
    wanted = weights_of(tmp_path / "out", backend)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found(torch.arange(6).view(1, 6))
    assert all(torch.equal(found.get_parameter(name), wanted[name]) for name in wanted if "proj" in name)


def test_zeros_of_a_mask_stay_zero_in_the_files(asked: Callable, tmp_path: Path, backend: Backend):
    steps = [{"prune": {"pattern": "2:4"}}, {"quantize": {"scheme": "int4", "group_size": 32}}]
    report = compress(asked(steps=steps))
    assert [step["step"] for step in report.steps] == ["prune", "quantize"]
    assert report.sparsity["targeted_weights"] >= 0.5
    for name, weight in weights_of(tmp_path / "out", backend).items():
        if "proj" in name:
            assert bool(((weight.view(len(weight), -1, 4) == 0).sum(2) >= 2).all())


def test_plain_weights_on_request(asked: Callable, tmp_path: Path):
    compress(asked(quantize={"scheme": "int2", "group_size": 32, "files": "values"}))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_parameter("model.layers.0.mlp.up_proj.weight")
    assert all(len(group.unique()) <= 4 for group in weight.view(-1, 32))


def test_without_prune_nothing_is_pruned():
    model = {"model": {"name": "x"}, "quantize": {"scheme": "int4"}}
    assert [step.name for step in Config(**model).recipe] == ["quantize"]
    both = Config(**model, prune={"pattern": "2:4"}, recover={"steps": 5})
    assert [step.name for step in both.recipe] == ["prune", "recover", "quantize"]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"steps": [{"quantize": {}}]}, "quantize without a scheme"),
        (
            {"steps": [{"quantize": {"scheme": "int4"}}, {"recover": {"steps": 3}}]},
            "after quantize, accepted: quantize as",
        ),
        ({"quantize": {"scheme": "int9"}}, "int9"),
    ],
)
def test_what_cannot_be_done_is_refused(sections: dict, said: str):
    with pytest.raises(UserError, match=said):
        load_config(None, {"model.name": "x", **sections})


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("llama", {"group_size": 64}, "group_size 64: rows of .* nearest size that fits all 21 weights is 32"),
        ("gpt2", {"group_size": 0}, "stores Linear weights alone"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_load(
    family: str, more: dict, said: str, asked: Callable, tmp_path: Path
):
    name = tmp_path / "m"
    model = tiny.build(family, **({"hidden_size": 64, "intermediate_size": 96} if family == "llama" else {}))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # would be refused as soon as it is read
    save(model, name)
    with pytest.raises(UserError, match=said):
        compress(asked(model={"name": str(name)}, quantize={"scheme": "int4", **more}))
