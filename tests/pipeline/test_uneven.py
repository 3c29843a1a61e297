"""Five batches on two ranks: ranks end together, or the job ends within the collectives' timeout; it never hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import ROOT
from tests.pipeline.conftest import launch_file

NM = ("prune.pattern=2:4", "prune.criterion=magnitude")
GRADUAL = ("prune.pattern=unstructured", "prune.sparsity=0.5", "prune.criterion=magnitude", "schedule.kind=linear")


@pytest.fixture
def run(saved_model, text_file: Path, tmp_path: Path):
    def job(how: str, *overrides: str) -> subprocess.CompletedProcess:
        layout = str(launch_file("cpu", tmp_path))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", layout]
        command += [str(ROOT / "tests/pipeline/uneven_script.py"), str(saved_model("llama")), str(text_file)]
        env = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = [*command, str(tmp_path / "out"), how, *overrides]
        return subprocess.run(words, capture_output=True, text=True, timeout=150, env=env, cwd=ROOT)

    return job


@pytest.mark.parametrize(("how", "steps"), [("padded", (3, 3)), ("joined", (3, 2))])
def test_zeros_hold_whatever_accelerate_does_about_a_last_odd_batch(
    run, how: str, steps: tuple[int, int], tmp_path: Path
):
    done = run(how, *NM)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank, count in enumerate(steps):
        assert f"rank {rank}: {count} steps" in done.stdout
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        if "_proj.weight" in name:
            zeros = (weight == 0).view(len(weight), -1, 4).sum(2)
            assert torch.equal(zeros, torch.full_like(zeros, 2)), name


@pytest.mark.parametrize("how", ["joined", pytest.param("left alone", marks=pytest.mark.slow)])
def test_a_rank_that_alone_reaches_a_mask_update_ends_the_job(run, how: str, tmp_path: Path):
    """The third step, which one rank takes, changes the masks. Nothing is exported then."""
    begin = time.monotonic()
    done = run(how, *GRADUAL, "schedule.every=1", "schedule.first=0.2", "schedule.freeze=0.0")
    assert done.returncode != 0, done.stdout
    assert time.monotonic() - begin < 120
    assert not (tmp_path / "out").exists()
