"""Zeros in a training checkpoint, after the tools that others convert it with: nothing of ours runs in between."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.pipeline.test_compressor import run


def converted(*words: str | Path) -> None:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def by_zero_to_fp32(state: Path, out: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The script that DeepSpeed puts beside its checkpoint: it joins the fp32 masters."""
    converted(state / "zero_to_fp32.py", state, out)
    yield "zero_to_fp32", torch.load(out / "pytorch_model.bin", weights_only=True)


def by_dcp(state: Path, out: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    source, out = state / "pytorch_model_fsdp_0", out.with_suffix(".pt")
    converted("-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", source, out)
    found = torch.load(out, weights_only=True)
    yield "dcp_to_torch", found.get("model", found)
    converted("-m", "accelerate.commands.accelerate_cli", "merge-weights", source, out.with_suffix(""))
    yield "accelerate merge-weights", load_file(out.with_suffix("") / "model.safetensors")


@pytest.mark.parametrize(
    "layout, tool",
    [
        ("zero3", by_zero_to_fp32),
        ("fsdp2", by_dcp),
        pytest.param("zero2", by_zero_to_fp32, marks=pytest.mark.slow),
    ],
)
def test_zeros_are_exact_after_the_stock_converters(layout: str, tool, saved_model, text_file: Path, tmp_path: Path):
    """save_state in the middle of a training with momentum and weight decay; the masks are those of the exported
    model."""
    done = run(layout, saved_model("llama"), text_file, tmp_path / "out", "prune.pattern=2:4")
    assert done.returncode == 0, done.stderr[-3000:]
    dense, final = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (saved_model("llama"), tmp_path / "out")
    )
    for name, found in tool(tmp_path / "state", tmp_path / "converted"):
        assert found.keys() == final.keys(), name
        for key, weight in found.items():
            assert not torch.equal(weight, dense[key]) and not torch.equal(weight, final[key]), (
                f"{key}: not of mid-training"
            )
            if "_proj.weight" in key:
                zeros = weight == 0
                assert torch.equal(zeros, final[key] == 0), f"{key} after {name}"
                assert (zeros.view(len(weight), -1, 4).sum(2) == 2).all() and not torch.signbit(weight[zeros]).any()
