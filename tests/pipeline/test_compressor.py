"""The five-line integration in a user's own Accelerate script, at two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from tests.conftest import ROOT
from tinygn_dist import Compressor, load_config
from tinygn_dist.backends.fsdp2 import FSDP2
from tinygn_dist.backends.zero import ZeroOptimizer, ZeroParameters
from tinygn_dist.errors import UserError


def run(folder: Path, data: Path, out: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests/pipeline/user_script.py"), str(folder), str(data), str(out), *overrides]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)


def test_masks_hold_through_the_users_own_training(saved_model, text_file: Path, tmp_path: Path):
    """Momentum, weight decay, accumulation and clipping, and still exactly half of every layer matrix is zero."""
    done = run(saved_model("llama"), text_file, tmp_path / "out", "prune.pattern=2:4")
    assert done.returncode == 0, done.stderr[-3000:]
    before = AutoModelForCausalLM.from_pretrained(saved_model("llama")).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in after.items():
        if "_proj.weight" in name:
            zeros = (weight == 0).view(len(weight), -1, 4).sum(2)
            assert torch.equal(zeros, torch.full_like(zeros, 2)), name
        assert not torch.equal(weight, before[name]), f"{name} was not trained"


def test_removed_units_train_on_in_the_users_own_loop(saved_model, text_file: Path, tmp_path: Path):
    done = run(saved_model("llama-tied"), text_file, tmp_path / "out", "prune.pattern=channels")
    assert done.returncode == 0, done.stderr[-3000:]
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert after.config.intermediate_size < 48
    assert after.lm_head.weight is after.model.embed_tokens.weight


def test_saving_weights_whose_masks_do_not_hold_is_refused(saved_model, text_file: Path, tmp_path: Path):
    """attach() was forgotten: the user is told, and no dense model is shipped as a sparse one."""
    from transformers import AutoTokenizer

    folder = saved_model("llama")
    asked = {"model.name": str(folder), "data.name": str(text_file), "prune.pattern": "2:4", "data.seq_len": 32}
    compressor = Compressor(load_config(overrides=asked), Accelerator(cpu=True))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = compressor.compress(AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(UserError, match="call attach"):
        compressor.save_pretrained(model, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_backends_that_shard_say_so():
    """Compressor refuses by this mark; a new sharded backend without it would be masked wrongly."""
    assert all(backend.shards_weights for backend in (FSDP2, ZeroOptimizer, ZeroParameters))
