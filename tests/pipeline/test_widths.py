"""Layers of different widths from the config to the folder: what plain from_pretrained loads, and a user's own
script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from accelerate import Accelerator

from tests import tiny
from tests.conftest import save
from tests.family_cases import build
from tinygn_dist.cli.main import main
from tinygn_dist.config import load_config
from tinygn_dist.errors import UserError
from tinygn_dist.integrations.compressor import Compressor
from tinygn_dist.pipeline import compress

SPARSE = [0.5, 0.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build(
        "gemma3n_text", vocab_size=tiny.VOCAB, vocab_size_per_layer_input=tiny.VOCAB, activation_sparsity_pattern=SPARSE
    )
    return save(model, tmp_path_factory.mktemp("gemma3n"))


def asking(dense: Path, text_file: Path, out: Path, **more):
    asked = {"model.name": str(dense), "data.name": str(text_file), "output.dir": str(out)}
    asked |= {"data.num_samples": 8, "data.eval_samples": 4, "data.seq_len": 16, "evaluate.latency": False}
    asked |= {"prune.pattern": "channels", "prune.uneven": True, "prune.multiple_of": 8}
    return load_config(overrides=asked | {name.replace("__", "."): value for name, value in more.items()})


@pytest.mark.parametrize(
    "more",
    [
        {"prune__sparsity": 0.15},
        {"prune__goal": "params=0.9"},
        {"prune__goal": "flops=0.9", "recover__steps": 6, "recover__seq_len": 16, "recover__batch_size": 4},
        {
            "prune__sparsity": 0.2,
            "recover__steps": 8,
            "recover__seq_len": 16,
            "recover__batch_size": 4,
            "schedule__kind": "iterative",
            "schedule__every": 3,
        },
        {"prune__sparsity": 0.15, "prune__protect": [2]},
    ],
    ids=["sparsity", "params", "recovered", "in rounds", "protected"],
)
def test_what_is_written_loads_and_meets_the_promise(dense: Path, text_file: Path, tmp_path: Path, more: dict):
    report = compress(asking(dense, text_file, tmp_path / "out", **more))
    loaded, before = (hf.AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "out", dense))
    widths = loaded.config.intermediate_size
    assert [layer.mlp.down_proj.in_features for layer in loaded.model.layers] == widths and widths[0] == 48
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters["kept"] == report.after["num_params"]
    gone = report.parameters["removed"] / sum(p.numel() for p in before.model.layers.parameters())
    if "prune__goal" in more:
        whole = sum(p.numel() for p in before.parameters())
        assert more["prune__goal"].startswith("flops") or report.parameters["kept"] <= 0.9 * whole
    else:
        assert gone >= more["prune__sparsity"]
    if "prune__protect" in more:
        assert widths[2] == 48
    prompt = torch.tensor([[5, 6, 7]])
    asked = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    cached, plain = (loaded.eval().generate(prompt, use_cache=use, **asked) for use in (True, False))
    assert torch.equal(cached, plain)


def test_a_users_own_script_gets_the_same_widths(dense: Path, text_file: Path, tmp_path: Path):
    config = asking(dense, text_file, tmp_path / "out", prune__sparsity=0.15)
    report = compress(config)
    model = hf.AutoModelForCausalLM.from_pretrained(dense)
    small = Compressor(config, Accelerator(cpu=True)).compress(model, hf.AutoTokenizer.from_pretrained(dense))
    assert small.config.intermediate_size == hf.AutoConfig.from_pretrained(tmp_path / "out").intermediate_size
    assert sum(p.numel() for p in small.parameters()) == report.parameters["kept"]


def test_a_class_with_one_width_is_refused_before_weights_load(saved_model, text_file: Path, tmp_path: Path):
    folder = saved_model("llama")
    with pytest.raises(UserError, match="LlamaForCausalLM builds its layers with one width"):
        compress(asking(folder, text_file, tmp_path / "out", prune__sparsity=0.15))


def test_inspect_tells_that_layers_may_differ(dense: Path, saved_model, capsys):
    assert main(["inspect", str(dense), "--json"]) == 0
    channels = json.loads(capsys.readouterr().out)["units"]["channels"]
    assert channels["count"] == 48 and "most" not in channels
    assert channels["note"] == "in 3 of 4 layers; layers may differ (prune.uneven)"
    assert main(["inspect", str(saved_model("llama")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["units"]["channels"].keys() == {
        "count",
        "params_each",
        "removable",
        "share",
    }


def test_inspect_tells_how_much_layers_differ(tmp_path: Path, capsys):
    model = build("gemma3n_text", intermediate_size=[48, 20, 33, 8])
    assert main(["inspect", str(save(model, tmp_path / "model"))]) == 0
    assert "8 to 48" in capsys.readouterr().out
