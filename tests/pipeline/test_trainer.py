"""The callback in transformers.Trainer: masks and schedule through its checkpoints, resume, best model and limit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import ROOT
from tests.pipeline.conftest import launch_file

HISTORY = "[(2, 0.3), (4, 0.4), (6, 0.5)]"
SCRIPT = str(ROOT / "tests/pipeline/trainer_script.py")


def run(layout: str | None, *words: object) -> str:
    """What the script printed, on one process, under torchrun, or under a launch file."""
    launch = []
    if layout == "torchrun":
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    elif layout:
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(launch_file(layout, Path(words[2]).parent))]
    env = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if layout in ("cpu", "torchrun") and not {"fsdp", "zero2", "zero3"} & set(words):  # it would turn sharding off
        env["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, *launch, SCRIPT, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_half(state: dict[str, torch.Tensor]) -> None:
    for name, weight in state.items():
        if "_proj.weight" in name:
            assert int((weight == 0).sum()) == weight.numel() // 2, name


@pytest.mark.parametrize(
    "layout",
    [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("torchrun", "cpu", "fsdp2", "zero2", "zero3"))],
)
def test_training_that_goes_on_from_a_checkpoint_ends_the_same(layout, saved_model, text_file: Path, tmp_path: Path):
    words = (saved_model("llama"), text_file, tmp_path / "out")
    told = run(layout, *words)
    assert f"ranks {2 if layout else 1}\nhistory {HISTORY}" in told and "logged [0.3, 0.4, 0.5]" in told, told
    whole = weights(tmp_path / "out/final")
    assert_half(whole)
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == ["checkpoint-6", "checkpoint-8"], "save_total_limit"
    shutil.rmtree(tmp_path / "out/checkpoint-8")
    shutil.rmtree(tmp_path / "out/final")
    assert HISTORY in run(layout, *words, "resume")
    again = weights(tmp_path / "out/final")
    for name, weight in whole.items():
        assert torch.equal(weight == 0, again[name] == 0), name
        torch.testing.assert_close(weight, again[name], rtol=0, atol=0 if layout in (None, "cpu", "torchrun") else 1e-5)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (None, ()),
        ("torchrun", ("fsdp",)),
        *(
            pytest.param("torchrun", words, marks=pytest.mark.slow)
            for words in (("zero2",), ("zero3",), ("sft",), ("sft", "fsdp"), ("sft", "zero3"))
        ),
        (None, ("sft",)),
    ],
)
def test_the_best_model_is_one_of_the_final_sparsity(layout, words, saved_model, text_file: Path, tmp_path: Path):
    """With the sharding that TrainingArguments ask for themselves. Best is the highest loss here, which the models with
    fewer zeros and less training have: without the rule the first one would be taken."""
    if "sft" in words:
        pytest.importorskip("trl", reason="SFTTrainer is in the package trl")
    asked = (saved_model("llama"), text_file, tmp_path / "out", "best", *words)
    told = run(layout, *asked)
    expected = {"fsdp": "FSDP2", "zero2": "ZeroOptimizer", "zero3": "ZeroParameters"}
    kind = next((expected[word] for word in words if word in expected), "Replicated")
    assert f"backend {kind} ranks {2 if layout else 1}" in told
    assert_best_is_the_sixth(told)
    whole = weights(tmp_path / "out/final")
    assert_half(whole)
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == ["checkpoint-6", "checkpoint-8"], "save_total_limit"
    shutil.rmtree(tmp_path / "out/checkpoint-8")
    shutil.rmtree(tmp_path / "out/final")
    told = run(layout, *asked, "resume")
    assert f"history {HISTORY}" in told
    assert_best_is_the_sixth(told)
    for name, weight in weights(tmp_path / "out/final").items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-5)


def assert_best_is_the_sixth(told: str) -> None:
    """It is the one that was loaded, too: its loss is measured again."""
    best, loss, now = told.split("best ")[1].split()[:5:2]
    assert Path(best).name == "checkpoint-6"
    assert float(now) == pytest.approx(float(loss), abs=2e-6)


def test_a_loop_that_begins_anew_has_one_schedule(saved_model, text_file: Path, tmp_path: Path):
    """The search for a batch size starts the loop again in the same process: the first loop's masks act no more."""
    told = run(None, saved_model("llama"), text_file, tmp_path / "out", "memory")
    attempts = told.split("attempts ")[1].splitlines()[0]
    assert attempts.startswith("[2") and "hooks 2" in attempts, told
    assert f"history {HISTORY}" in told, told
    logged = told.split("logged ")[1].splitlines()[0]
    assert logged.endswith("0.3, 0.4, 0.5]"), logged
    assert_half(weights(tmp_path / "out/final"))


def test_units_are_refused(tmp_path: Path, saved_model):
    from transformers import Trainer, TrainingArguments

    from tinygn_dist import load_config
    from tinygn_dist.errors import UserError
    from tinygn_dist.integrations.trainer import TinyGNCallback

    model = AutoModelForCausalLM.from_pretrained(saved_model("llama"))
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))
    with pytest.raises(UserError, match="before the Trainer makes its optimizer"):
        TinyGNCallback(load_config(overrides={"model.name": "m", "prune.pattern": "channels"}), trainer)
