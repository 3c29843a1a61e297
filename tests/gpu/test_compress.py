"""`tinygn compress` of a bf16 model on all GPUs, from its folder to a checkpoint that one CPU loads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import ROOT, Cli
from tests.gpu.conftest import GPUS, enough
from tests.pipeline.conftest import SMALL, report_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
WORDS = [*SMALL, "--model.dtype=bfloat16", "--recover-steps=5", f"--recover.batch_size={4 * max(GPUS, 1)}"]


def check(out: Path, processes: int) -> dict[str, torch.Tensor]:
    report = report_of(out)
    assert report["num_processes"] == processes and math.isfinite(report["after"]["perplexity"])
    assert len(report["peak_memory_gib"]) == len(report["peak_device_gib"]) == processes
    state = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert {weight.dtype for weight in state.values()} == {torch.bfloat16}
    return state


@pytest.mark.parametrize("layout", ["alone", "ddp", "fsdp2", "zero2", "zero3"])
def test_two_of_four_weights_in_bf16(cli: Cli, saved_model, tmp_path: Path, layout: str):
    words = ["--model", saved_model("llama"), "--output", tmp_path / "out", "--pattern", "2:4", *WORDS]
    if layout == "alone":
        processes, done = 1, cli.tinygn("compress", *words)
    else:
        processes = enough(max(2, GPUS))
        config = ("--config_file", str(ROOT / f"configs/accelerate/{layout}.yaml"), "--num_processes", str(processes))
        done = cli.accelerate(*words, launcher=config)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, weight in check(tmp_path / "out", processes).items():
        if "_proj.weight" in name:
            assert ((weight == 0).view(len(weight), -1, 4).sum(2) >= 2).all(), name


def test_fewer_channels_in_bf16(cli: Cli, saved_model, tmp_path: Path):
    words = ["--model", saved_model("llama"), "--output", tmp_path / "out", "--pattern", "channels", *WORDS]
    done = cli.tinygn("compress", *words, "--num-processes", max(GPUS, 1))
    assert done.returncode == 0, done.stderr[-4000:]
    up = check(tmp_path / "out", max(GPUS, 1))["model.layers.0.mlp.up_proj.weight"]
    assert len(up) < 48
