"""What ranks check about each other before they work: a wrong start ends every rank, with one line."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from tests.conftest import ROOT
from tests.pipeline.conftest import SMALL
from tinygn_dist.backends import launch_checks
from tinygn_dist.errors import Refused

WORDS = ["compress", *SMALL, "--pattern=2:4", "--criterion=magnitude", "--distributed.timeout_seconds=15"]


def two_nodes(words: list[list[str]], homes: list[Path]) -> list[tuple[int, list[str]]]:
    """(exit code, the lines of ours) of two ranks as two machines start them; each runs the code in its home."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    place |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tinygn_dist.cli", *words[rank]],
            cwd=homes[rank],
            env={**os.environ, **place, "PYTHONPATH": str(homes[rank]), "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=120)[1] for rank in started]
    lines = [[line for line in text.splitlines() if line.startswith("tinygn: ")] for text in told]
    return [(rank.returncode, ours) for rank, ours in zip(started, lines, strict=True)]


def test_ranks_with_other_code_are_stopped(saved_model, tmp_path: Path):
    """One comment in one file is enough."""
    shutil.copytree(ROOT / "tinygn_dist", tmp_path / "tinygn_dist", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "tinygn_dist" / "errors.py").open("a") as file:
        file.write("# left behind\n")
    words = [*WORDS, f"--model={saved_model('llama')}", f"--output={tmp_path / 'out'}"]
    (code, told), other = two_nodes([words, words], [ROOT, tmp_path])
    assert code == 2 and other == (2, [])  # rank 0 speaks for all
    assert len(told) == 1 and "ranks disagree about the sources of tinygn_dist: rank 0 has" in told[0]
    assert not (tmp_path / "out").exists()


def test_a_node_with_a_typo_says_so_and_the_other_does_not_wait_for_ever(saved_model, tmp_path: Path):
    words = [*WORDS, f"--model={saved_model('llama')}", f"--output={tmp_path / 'out'}"]
    (code, told), (other, why) = two_nodes([words, [*words, "--prune.sparsity=7"]], [ROOT, ROOT])
    assert other == 2 and len(why) == 1 and "sparsity" in why[0]
    assert code == 2 and len(told) == 1 and "did not find each other in 15 s" in told[0]


@pytest.mark.parametrize(
    "launched, connected, seen, asked, kind, part",
    [
        (2, 1, 1, None, None, "started 2 processes, torch.distributed connects 1, Accelerate sees 1"),
        (2, 2, 1, None, None, "torch.distributed connects 2, Accelerate sees 1"),
        (1, 1, 2, None, None, "started 1 processes"),
        (1, 1, 1, 2, None, "2 processes were asked for, 1 are running"),
        (2, 2, 2, 2, "FSDP", "FSDP was asked for, Accelerate fell back to MULTI_CPU"),
        (2, 2, 2, None, "DEEPSPEED", "DEEPSPEED was asked for, Accelerate fell back to MULTI_CPU"),
    ],
)
def test_processes_that_are_not_those_asked_for(monkeypatch, launched, connected, seen, asked, kind, part):
    monkeypatch.setenv("WORLD_SIZE", str(launched))
    monkeypatch.setattr(launch_checks, "world_size", lambda: connected)
    for name in ("FSDP", "DEEPSPEED"):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", str(kind == name).lower())
    found = SimpleNamespace(num_processes=seen, distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(Refused) as refused:
        launch_checks.check_processes(found, asked, callers_own=False)
    assert part in str(refused.value) and "\n" not in str(refused.value)
    advice = ("launch with", "use `accelerate launch", "start at least")
    assert any(words in str(refused.value) for words in advice)
