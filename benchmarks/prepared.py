"""A model on its backend with windows of a dataset: what benchmarks inside the process measure on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from tinygn_dist.backends import make_backend
from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints import load
from tinygn_dist.checkpoints.sharded_load import placed
from tinygn_dist.config import DataConfig, DistributedConfig, ModelConfig
from tinygn_dist.data import splits as calibration
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.models.objective import objective_of
from tinygn_dist.runtime.progress import Progress

ROOT = Path(__file__).parents[1]


def add_arguments(parser: ArgumentParser, *, windows: int, seq_len: int) -> None:
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--windows", type=int, default=windows, help="sequences, one per micro-batch")
    parser.add_argument("--seq-len", type=int, default=seq_len, help="tokens of each")


def problem_of(asked: Namespace, backend: Backend | None = None) -> Problem:
    """The model, and `windows` calibration sequences of the data as `tinygn compress` draws them."""
    backend = backend or make_backend(DistributedConfig(timeout_seconds=600))
    source = load.find_model(ModelConfig(name=asked.model))
    model, _ = placed(source, backend)
    data = DataConfig(name=asked.data, num_samples=asked.windows, seq_len=asked.seq_len, eval_samples=1)
    reader = calibration.Reader(source.task, load.load_processor(source), source.config)
    splits = calibration.load_splits(data, reader)
    anatomy = read_anatomy(load.skeleton(source), needs_units=True)
    return Problem(model, anatomy, objective_of(source.task), splits.calibration, backend, Progress())


def on_ranks(script: str, ranks: int, words: list[str]) -> dict[str, Any]:
    """Run a script on connected ranks of one thread each; it writes facts.json into the folder that `--measure`
    names."""
    with tempfile.TemporaryDirectory() as folder:
        start = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
        start += ["--num_processes", str(ranks)]
        command = [sys.executable, *(start if ranks > 1 else []), script, "--measure", folder, *words]
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return json.loads((Path(folder) / "facts.json").read_text())
