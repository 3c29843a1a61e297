"""`tinygn compress` with block reconstruction between compression and recovery."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.pipeline.conftest import report_of
from tinygn_dist.run import state

TUNED = ["--reconstruct.epochs=3", "--reconstruct.rate=0.01", "--data.num_samples=8", "--data.micro_batch=1"]


@pytest.mark.parametrize(
    ("pattern", "sparsity", "layers"),
    [("unstructured", 0.5, 3), ("2:4", 0.5, 3), ("channels", 0.3, 3), ("layers", 0.3, 2)],
)
def test_layers_come_closer_to_the_dense_model(
    compress, saved_model, text_file, tmp_path, pattern: str, sparsity: float, layers: int
):
    asked = [f"--pattern={pattern}", f"--sparsity={sparsity}", "--data", text_file]
    asked.append("--prune.compensate=false")  # a re-fit of units leaves nothing to gain on so small a model
    done = compress(saved_model("llama"), tmp_path / "plain", *asked, *TUNED, "--reconstruct.epochs=0")
    assert done.code == 0, done.err
    assert report_of(tmp_path / "plain")["reconstruction"] == {}
    done = compress(saved_model("llama"), tmp_path / "tuned", *asked, *TUNED)
    assert done.code == 0, done.err
    report = report_of(tmp_path / "tuned")
    told = report["reconstruction"]
    assert (told["epochs"], told["fitted_sequences"], told["held_out_sequences"]) == (3, 7, 1)
    assert [layer["layer"] for layer in told["layers"]] == list(range(layers))
    assert all(layer["after"] <= layer["before"] for layer in told["layers"])
    assert any(layer["after"] < 0.99 * layer["before"] for layer in told["layers"])
    assert report["seconds"]["reconstruct"] > 0
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("plain", "tuned")]
    assert all(torch.equal(tensor == 0, states[1][name] == 0) for name, tensor in states[0].items())
    moved = {name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])}
    assert moved and all("_proj.weight" in name for name in moved)


def test_recovery_follows_with_the_same_dense_model_as_teacher(compress, saved_model, text_file, tmp_path):
    asked = ["--pattern=unstructured", "--sparsity=0.5", "--criterion=magnitude", "--recover-steps=2"]
    asked += ["--recover.seq_len=16", "--recover.batch_size=2", "--data", text_file]
    with mock.patch.object(state, "placed", None):  # no third copy
        done = compress(saved_model("llama"), tmp_path / "out", *asked, *TUNED)
    assert done.code == 0, done.err
    report = report_of(tmp_path / "out")
    assert report["reconstruction"]["layers"][0]["epoch"] > 0 and report["recovery"]["steps"] == 2
    assert report["sparsity"]["targeted_weights"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--pattern=hidden"], "reconstruct.epochs 3 compares hidden states .* pattern hidden"),
        (
            ["--data.num_samples=1"],
            "reconstruct.epochs 3 with 1 micro-batches of calibration data, accepted: 2 or more",
        ),
        (
            ["--schedule.kind=cubic", "--recover-steps=400"],
            "reconstruct.epochs 3 after schedule.kind cubic .* accepted: one-shot",
        ),
    ],
)
def test_what_cannot_be_reconstructed_is_refused(compress, saved_model, tmp_path, words: list[str], told: str):
    done = compress(saved_model("llama"), tmp_path / "out", "--pattern=unstructured", *TUNED, *words)
    assert done.code == 2
    assert re.search(told, done.told), done.told
