"""One `tinygn compress` of a benchmark, and the report that it read back from disk."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Failed(Exception):
    """The last line of what a run said."""


def told(done: subprocess.CompletedProcess) -> None:
    """Raises Failed when a process ended with another code than 0."""
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["no message"])[-1])


def report_of(asked: Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """The report of a run on what was asked: model, data, evaluation, processes. Raises Failed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model"
        command = [sys.executable, "-m", "tinygn_dist.cli", "compress", "--model", asked.model, "--data", asked.data]
        command += ["--data.evaluation", asked.evaluation] if asked.evaluation else []
        command += ["--output", str(output), "--num-processes", str(asked.processes), *arguments]
        told(subprocess.run(command, capture_output=True, text=True, check=False))
        return json.loads((output / "tinygn_report.json").read_text())
