"""The five-line integration in a user's own Accelerate script, at two ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ROOT
from tests.pipeline.conftest import launch_file
from tinygn_dist import Compressor, load_config
from tinygn_dist.errors import UserError

GRADUAL = ("prune.pattern=unstructured", "prune.sparsity=0.5", "prune.criterion=magnitude", "schedule.kind=linear")


def run(
    layout: str, folder: Path, data: Path, out: Path, *overrides: str, precision: str = "no"
) -> subprocess.CompletedProcess:
    """Under the launch file people copy, with gradient accumulation left to the script."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(launch_file(layout, out.parent)),
        "--mixed_precision",
        precision,
    ]
    command += [str(ROOT / "tests/pipeline/user_script.py"), str(folder), str(data), str(out), *overrides]
    env = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=env, cwd=ROOT)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_masks_hold_through_the_users_own_training(precision: str, saved_model, text_file: Path, tmp_path: Path):
    """Momentum, weight decay, accumulation and clipping, and still exactly half of every layer matrix is zero; in the
    average of the weights too, which began before they went."""
    done = run("cpu", saved_model("llama"), text_file, tmp_path / "out", "prune.pattern=2:4", precision=precision)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"in {precision}" in done.stdout
    before = AutoModelForCausalLM.from_pretrained(saved_model("llama")).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    average = AutoModelForCausalLM.from_pretrained(tmp_path / "out-average").state_dict()
    for name, weight in after.items():
        if "_proj.weight" in name:
            zeros = (weight == 0).view(len(weight), -1, 4).sum(2)
            assert torch.equal(zeros, torch.full_like(zeros, 2)), name
            assert torch.equal(average[name] == 0, weight == 0), name
        assert not torch.equal(weight, before[name]), f"{name} was not trained"
        assert not torch.equal(weight, average[name])


@pytest.mark.parametrize(
    "layout", ["cpu", "fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3"))]
)
def test_sparsity_grows_in_the_users_own_loop_and_goes_on_from_their_checkpoint(
    layout: str, saved_model, text_file: Path, tmp_path: Path
):
    """Zeros after every micro-batch and one count per optimizer step are asserted in the script."""
    words = (*GRADUAL, "schedule.every=2", "schedule.first=0.2")
    done = run(layout, saved_model("llama"), text_file, tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    level = [0.2] * 3 + [0.3] * 4 + [0.4] * 4 + [0.5] * 5  # the update follows the last micro-batch of steps 2, 4 and 6
    assert str(level) in done.stdout, done.stdout
    shutil.move(tmp_path / "out", tmp_path / "whole")
    done = run(layout, saved_model("llama"), text_file, tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(level[8:]) in done.stdout, done.stdout
    whole, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "out"))
    for name, weight in whole.items():
        assert torch.equal(weight == 0, again[name] == 0), name
        torch.testing.assert_close(weight, again[name], rtol=0, atol=0 if layout == "cpu" else 1e-6)


def test_removed_units_train_on_in_the_users_own_loop(saved_model, text_file: Path, tmp_path: Path):
    done = run("cpu", saved_model("llama-tied"), text_file, tmp_path / "out", "prune.pattern=channels")
    assert done.returncode == 0, done.stderr[-3000:]
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert after.config.intermediate_size < 48
    assert after.lm_head.weight is after.model.embed_tokens.weight


@pytest.fixture
def started(saved_model, text_file: Path):
    """A compressor on one process, and the model and tokenizer it has seen."""

    def make(**asked: object):
        folder = saved_model("llama")
        base = {"model.name": str(folder), "data.name": str(text_file), "prune.pattern": "2:4", "data.seq_len": 32}
        compressor = Compressor(load_config(overrides={**base, "data.num_samples": 4, **asked}), Accelerator(cpu=True))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return compressor, compressor.compress(AutoModelForCausalLM.from_pretrained(folder), tokenizer), tokenizer

    return make


def test_saving_weights_whose_masks_do_not_hold_is_refused(started, tmp_path: Path):
    """attach() was forgotten, or the weights were trained by something else: no dense model is shipped as a sparse
    one."""
    compressor, model, tokenizer = started()
    with pytest.raises(UserError, match="call attach"):
        compressor.save_pretrained(model, tmp_path / "out", tokenizer)
    compressor.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(UserError, match="masked weights are not zero"):
        compressor.save_pretrained(model, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_several_optimizers_and_a_skipped_step(started):
    """Each holds its own weights; a step that the gradient scaler leaves out moves neither masks nor schedule."""
    compressor, model, _ = started(**{"schedule.kind": "linear", "schedule.every": 1})
    attention = [p for name, p in model.named_parameters() if "self_attn" in name]
    others = [p for name, p in model.named_parameters() if "self_attn" not in name]
    first, second = (torch.optim.AdamW(ps, lr=0.1, weight_decay=0.1) for ps in (attention, others))
    compressor.attach(model, first, second, num_steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for number, bad in enumerate((False, True, False, False)):
        loss = model(input_ids=torch.arange(3, 13)[None], labels=torch.arange(3, 13)[None]).loss
        scaler.scale(loss).backward()
        if bad:
            for parameter in model.parameters():
                parameter.grad.fill_(torch.inf)
        scaler.step(second)
        scaler.step(first)
        scaler.update()
        first.zero_grad()
        second.zero_grad()
        assert compressor.masks.steps == number + 1 - (number >= 1)
        assert compressor.masks.masks.violations(model, compressor.backend) == 0
    assert [update.step for update in compressor.masks.history] == [1, 2, 3]
    assert compressor.masks.history[-1].sparsity == 0.5


def test_forgotten_calls_are_told(started, tmp_path: Path):
    compressor, model, tokenizer = started()
    with pytest.raises(UserError, match="got no optimizer"):
        compressor.attach(model)
    anew = Compressor(compressor.config, Accelerator(cpu=True))
    for call in (lambda: anew.attach(model, None), lambda: anew.save_pretrained(model, tmp_path / "out", tokenizer)):
        with pytest.raises(UserError, match="call model = compressor.compress"):
            call()


@pytest.mark.parametrize(
    ("asked", "steps", "message"),
    [
        ({"schedule.kind": "cubic"}, None, "needs attach.*num_steps"),
        ({"prune.pattern": "channels", "schedule.kind": "cubic"}, 10, "units can only go before your optimizer"),
        ({"reconstruct.epochs": 2}, None, "a step reconstruct is for `tinygn compress`"),
    ],
)
def test_what_cannot_work_is_told(started, asked: dict, steps: int | None, message: str):
    with pytest.raises(UserError, match=message):
        compressor, model, _ = started(**asked)
        compressor.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), num_steps=steps)
