"""Recipes that are lists of steps, each on the model that the one before it left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.pipeline.test_resume import TRAINED, stopped_after
from tinygn_dist.config import Config
from tinygn_dist.errors import Stopped
from tinygn_dist.pipeline import compress
from tinygn_dist.run.report import Report

UNITS = {"prune": {"pattern": "channels", "sparsity": 0.3, "multiple_of": 8}}
TWO_OF_FOUR = {"prune": {"pattern": "2:4", "criterion": "wanda"}}
RECOVER = {"recover": {"steps": 4, "seq_len": 16, "batch_size": 2}}


def asked(model: Path, data: Path, out: Path, steps: list[dict], **sections: dict) -> Config:
    whole_run = {key: value for key, value in TRAINED.items() if key.startswith(("data.", "evaluate."))}
    common: dict[str, dict] = {"data": {"name": str(data)}, "evaluate": {}}
    for key, value in whole_run.items():
        section, name = key.split(".")
        common[section][name] = value
    return Config(model={"name": str(model)}, output={"dir": str(out)}, steps=steps, **common | sections)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def in_groups_of_four(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Zeros in every four consecutive inputs of each matrix inside the layers."""
    matrices = {name: tensor for name, tensor in state.items() if "_proj.weight" in name}
    return {name: (tensor.reshape(-1, 4) == 0).sum(1) for name, tensor in matrices.items()}


def test_units_go_then_two_of_four_then_it_trains(saved_model, text_file, tmp_path):
    report = compress(asked(saved_model("llama"), text_file, tmp_path / "out", [UNITS, TWO_OF_FOUR, RECOVER]))
    assert [row["step"] for row in report.steps] == ["prune", "prune", "recover"]
    dense, small = (AutoModelForCausalLM.from_pretrained(f) for f in (saved_model("llama"), tmp_path / "out"))
    assert small.config.intermediate_size < dense.config.intermediate_size
    assert all((zeros == 2).all() for zeros in in_groups_of_four(small.state_dict()).values())
    assert report.recovery["steps"] == 4
    counted = report.parameters
    parts = ("removed", "targeted", "kept_by_pattern", "kept_not_a_layer_matrix")
    assert counted["dense"] == sum(p.numel() for p in dense.parameters()) == sum(counted[part] for part in parts)
    assert counted["set_to_zero"] == counted["targeted"] // 2
    assert len(report.earlier_selections) == 1 and report.compressed["perplexity"] != report.after["perplexity"]
    assert Report.read(tmp_path / "out").asked() == "channels 30%, then 2:4, then 4 steps of recovery"


def test_the_flat_form_is_the_usual_order(saved_model, text_file, tmp_path):
    listed = asked(saved_model("llama"), text_file, tmp_path / "listed", [UNITS, RECOVER])
    flat = asked(saved_model("llama"), text_file, tmp_path / "flat", [], **UNITS, **RECOVER)
    assert listed.recipe == flat.recipe
    for config in (listed, flat):
        compress(config)
    assert (tmp_path / "listed/model.safetensors").read_bytes() == (tmp_path / "flat/model.safetensors").read_bytes()


def test_a_step_may_come_again(saved_model, text_file, tmp_path):
    """Zeros of the first pruning stay zero, in the training between and after the second one."""
    third, half = ({"prune": {"pattern": "unstructured", "sparsity": s, "criterion": "magnitude"}} for s in (0.3, 0.5))
    first = compress(asked(saved_model("llama"), text_file, tmp_path / "first", [third, RECOVER]))
    report = compress(asked(saved_model("llama"), text_file, tmp_path / "out", [third, RECOVER, half, RECOVER]))
    before, after = weights(tmp_path / "first"), weights(tmp_path / "out")
    zeros = {name: tensor == 0 for name, tensor in before.items() if "_proj.weight" in name}
    assert all((after[name][zero] == 0).all() for name, zero in zeros.items())
    assert first.sparsity["targeted_weights"] == pytest.approx(0.3, abs=1e-3)
    assert report.sparsity["targeted_weights"] == pytest.approx(0.5, abs=1e-3)


def test_units_again_are_a_share_of_what_is_left_and_goals_are_of_the_dense_model(saved_model, text_file, tmp_path):
    layers = {"prune": {"pattern": "layers", "counts": {"layers": 1}}}
    goal = {"prune": {"pattern": "channels", "goal": "params=0.6", "multiple_of": 1}}
    report = compress(asked(saved_model("llama"), text_file, tmp_path / "out", [layers, goal]))
    dense = report.before["num_params"]
    assert report.after["num_params"] <= 0.6 * dense
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    one_channel = 3 * config.hidden_size * config.num_hidden_layers
    assert report.after["num_params"] > 0.6 * dense - one_channel


@pytest.mark.parametrize("stops", [(0,), (1,), (3,), (0, 0, 2)])
def test_a_recipe_goes_on_where_it_was_stopped(saved_model, text_file, tmp_path, stops: tuple[int, ...]):
    """stops: how often each part of the run is asked whether to stop, and is told no: after each step but the last, and
    in training."""
    recipe = [UNITS, TWO_OF_FOUR, RECOVER]
    whole = asked(saved_model("llama"), text_file, tmp_path / "whole", recipe)
    parts = asked(saved_model("llama"), text_file, tmp_path / "parts", recipe, checkpoint={"resume": "auto"})
    compress(whole)
    for calls in stops:
        with pytest.raises(Stopped):
            compress(parts, stopping=stopped_after(calls))
    report = compress(parts)
    assert len(report.recovery["resumed_after_steps"]) == len(stops)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name]), name
    assert not list(tmp_path.glob("*.checkpoints"))
