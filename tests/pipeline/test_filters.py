"""Filters from the config to the folder: a VGG that plain from_pretrained loads with the code in its folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from tinygn_dist import pipeline
from tinygn_dist.checkpoints import load
from tinygn_dist.config import load_config
from tinygn_dist.data.splits import Splits
from tinygn_dist.models.vgg import VggConfig, VggForImageClassification
from tinygn_dist.run import loading

ROOT = Path(__file__).parents[2]


def batches(count: int, size: int) -> list[dict[str, torch.Tensor]]:
    """Images whose class is the channel that is bright: something a tiny net learns."""
    generator = torch.Generator().manual_seed(count)
    made = []
    for _ in range(count):
        labels = torch.randint(0, 3, (size,), generator=generator)
        pixels = torch.randn(size, 3, 16, 16, generator=generator)
        made.append({"pixel_values": pixels + 2 * torch.eye(3)[labels][:, :, None, None], "labels": labels})
    return made


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_a_smaller_vgg_is_written_and_learns_again(tmp_path: Path, monkeypatch, optimizer: str):
    torch.manual_seed(0)
    dense = VggForImageClassification(
        VggConfig(filters=(8, 0, 16, 16, 0), hidden=(16,), image_size=16, num_labels=3, dropout=0.0)
    )
    dense.save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(load, "load_processor", lambda source: SimpleNamespace(save_pretrained=lambda folder: None))
    splits = Splits(
        batches(2, 8),
        batches(2, 8),
        batches(64, 1),
        {n: {"source": "here", "sequences": 16} for n in ("calibration", "evaluation")},
    )
    monkeypatch.setattr(loading, "load_splits", lambda *args, **kwargs: splits)
    asked = {"model.name": str(tmp_path / "dense"), "prune.pattern": "filters", "prune.sparsity": 0.4}
    asked |= {"prune.uneven": True, "prune.multiple_of": 2, "output.dir": str(tmp_path / "out")}
    asked |= {"recover.steps": 20, "recover.batch_size": 8, "recover.learning_rate": 0.02, "recover.distill": 0.0}
    report = pipeline.compress(load_config(overrides=asked | {"recover.optimizer": optimizer}))
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters["kept"] <= 0.6 * report.parameters["dense"]
    assert report.after["accuracy"] >= 0.8 and report.after["loss"] < report.compressed["loss"]
    assert {len(units) for units in report.selection["kept"]["filters"].values()} != {8}
    alone = (
        "import sys, transformers; m = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1], "
        "trust_remote_code=True); assert 'tinygn_dist' not in sys.modules; print(sum(p.numel() for p in "
        "m.parameters()))"
    )
    if optimizer == "sgd":  # a process that does not know this package
        done = subprocess.run(
            [sys.executable, "-c", alone, str(tmp_path / "out")], capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == str(report.parameters["kept"]), done.stderr


def test_the_worked_example_runs_offline(tmp_path: Path):
    pytest.importorskip("PIL")
    pytest.importorskip("sklearn")
    made = [sys.executable, "launch/vgg16.py", "--data", "digits", "--width", "0.125", "--epochs", "1"]
    subprocess.run([*made, "--output", str(tmp_path / "vgg16")], cwd=ROOT, check=True, capture_output=True)
    recipe = (ROOT / "configs/recipes/vgg16-cifar10.yaml").read_text().replace(" vgg16/", f" {tmp_path}/vgg16/")
    (tmp_path / "recipe.yaml").write_text(recipe)
    asked = ["--recipe", str(tmp_path / "recipe.yaml"), "--criterion", "gate", "--estimator", "backprop"]
    asked += ["--recover-steps", "2", "--output", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-m", "tinygn_dist.cli", "compress", *asked], cwd=ROOT, check=True)
    assert (tmp_path / "out" / "vgg.py").is_file()
