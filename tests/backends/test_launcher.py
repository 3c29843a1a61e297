"""How many processes a launch was asked for, by the rules of Accelerate's own launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tinygn_dist.backends.launcher import accelerate_arguments, processes_asked

TWO = str(ROOT / "configs/accelerate/cpu.yaml")
SCRIPT = "launch/compress.py"


@pytest.mark.parametrize(
    "arguments, asked",
    [
        (["--config_file", TWO], 2),
        ([f"--config_file={TWO}"], 2),
        (["--config-file", TWO], 2),
        (["--config_file", TWO, "--num_processes", "4"], 4),
        (["--num_processes", "4", "--config_file", TWO], 4),
        (["--num-processes=3", "--config_file", TWO], 3),
        (["--config_file", TWO, "--num_processes", "8", "--num_machines", "2", "--machine_rank", "1"], 8),
        (["--cpu", "--num_processes", "2"], 2),  # it starts one, which is then refused
        (["--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"], 2),
        ([], None),
    ],
)
def test_flags_go_before_the_file(arguments: list[str], asked: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", "/nowhere")
    assert processes_asked([*arguments, SCRIPT, "--model", "m"]) == asked
    # what stands behind the script is the script's own
    assert processes_asked([*arguments, SCRIPT, "--num_processes", "7", "--config_file", "x.yaml"]) == asked


def test_the_default_config_counts_where_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "default_config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(Path(TWO).read_text()) | {"num_processes": 5}))
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", str(file))
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    assert processes_asked([SCRIPT]) == 5
    assert processes_asked(["--config_file", TWO, SCRIPT]) == 2


def test_a_file_that_only_the_launcher_could_read_says_nothing():
    assert processes_asked(["--config_file", "/dev/fd/63", SCRIPT]) is None


@pytest.mark.parametrize(
    "command",
    [
        ["{bin}/accelerate", "launch"],
        ["{bin}/accelerate-launch"],
        ["{python}", "-m", "accelerate.commands.launch"],
        ["{python}", "-u", "-m", "accelerate.commands.accelerate_cli", "launch"],
    ],
)
def test_the_parent_is_found_however_it_was_started(command: list[str], monkeypatch: pytest.MonkeyPatch):
    places = {"bin": "/venv/bin", "python": "/venv/bin/python"}
    words = ["/venv/bin/python", *(word.format(**places) for word in command)]
    words = words[1:] if command[0] == "{python}" else words
    parent = type("Parent", (), {"cmdline": lambda self: [*words, "--cpu", SCRIPT]})()
    monkeypatch.setattr("psutil.Process.parent", lambda self: parent)
    assert accelerate_arguments() == ["--cpu", SCRIPT]


def test_other_parents_are_no_launcher():
    code = "from tinygn_dist.backends.launcher import accelerate_arguments as asked; print(asked())"
    words = [sys.executable, "-c", code, "accelerate", "launch"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout == "None\n", done.stderr
