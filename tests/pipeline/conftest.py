"""Runs of `compress` on tiny models: in this process, in connected processes, and through the real launchers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tinygn_dist.cli.main import main

SMALL = [
    "--data.seq_len=32",
    "--data.num_samples=4",
    "--data.eval_samples=3",
    "--data.micro_batch=2",
    "--prune.multiple_of=8",
    "--evaluate.latency=false",
]


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def told(self) -> str:
        """The one line a failed run tells the user."""
        lines = [line for line in self.err.splitlines() if line.startswith("tinygn: ")]
        assert self.code != 0, f"expected a failure:\n{self.out}\n{self.err}"
        assert len(lines) == 1 and "Traceback" not in self.err, self.err
        return lines[0]


@pytest.fixture
def tinygn(capfd: pytest.CaptureFixture) -> Callable[..., Done]:
    """The command line entered in this process: `tinygn("compress", ...)`."""

    def run(*words: Any) -> Done:
        capfd.readouterr()
        code = main([str(word) for word in words])
        told = capfd.readouterr()
        return Done(code, told.out, told.err)

    return run


@pytest.fixture
def compress(tinygn: Callable[..., Done]) -> Callable[..., Done]:
    """`tinygn compress` with small data; more words win."""
    return lambda model, out, *words: tinygn("compress", "--model", model, "--output", out, *SMALL, *words)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tinygn_report.json").read_text(encoding="utf-8"))


def launch_file(layout: str, folder: Path) -> Path:
    """The launch file people copy, with what the caller's script decides (accumulation, batch size) left to it."""
    asked = yaml.safe_load((ROOT / f"configs/accelerate/{layout}.yaml").read_text(encoding="utf-8"))
    if layout.startswith("zero"):
        engine = json.loads((ROOT / f"configs/deepspeed/{layout}.json").read_text(encoding="utf-8"))
        engine |= {"gradient_accumulation_steps": "auto", "train_micro_batch_size_per_gpu": "auto"}
        engine |= {"gradient_clipping": 1.0}
        (folder / "engine.json").write_text(json.dumps(engine), encoding="utf-8")
        asked["deepspeed_config"]["deepspeed_config_file"] = str(folder / "engine.json")
    (folder / "launch.yaml").write_text(yaml.safe_dump(asked), encoding="utf-8")
    return folder / "launch.yaml"
