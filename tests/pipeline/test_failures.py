"""A rank that is killed, or an output that two runs want: every process ends, with a code and a line, and nothing is
half-written."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.pipeline.conftest import SMALL
from tinygn_dist.backends import launcher

WORDS = [*SMALL, "--pattern=unstructured", "--sparsity=0.5", "--recover-steps=40", "--recover.batch_size=4"]
WORDS += ["--distributed.timeout_seconds=30"]
GONE_SECONDS = 60
"""the collective timeout, and the launcher's own patience"""
LAUNCHERS = {
    "tinygn": ["-m", "tinygn_dist.cli", "compress", "--num-processes=2"],
    "accelerate": [
        "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/fsdp2.yaml"),
        str(ROOT / "launch/compress.py"),
    ],
}  # fmt: skip


def start(launcher: str, model: Path, out: Path, log: Path) -> psutil.Popen:
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *LAUNCHERS[launcher], f"--model={model}", f"--output={out}", *WORDS]
    with log.open("w") as stream:
        return psutil.Popen(words, cwd=ROOT, env=surroundings, stdout=stream, stderr=subprocess.STDOUT)


def ranks_of(job: psutil.Popen) -> dict[int, psutil.Process]:
    """The processes that have a rank, once they are there."""
    found = {}
    for child in job.children(recursive=True):
        try:
            rank = child.environ().get("RANK")
        except psutil.Error:
            continue
        if rank is not None and "resource_tracker" not in " ".join(child.cmdline()):
            found.setdefault(int(rank), child)
    return found


def killed_after(seconds: float, victim: int, job: psutil.Popen) -> list[psutil.Process] | None:
    """Kill a rank `seconds` after all ranks are there; returns every process of the job at that moment, or None when it
    had finished."""
    deadline = time.monotonic() + 60
    while len(ranks := ranks_of(job)) < 2:
        assert time.monotonic() < deadline and job.is_running(), "the ranks never started"
        time.sleep(0.02)
    time.sleep(seconds)
    try:
        everyone = [job, *job.children(recursive=True)]
        if not stopped(ranks[victim]):
            return None
        ranks[victim].kill()
    except psutil.NoSuchProcess:
        return None
    return everyone


def stopped(process: psutil.Process) -> bool:
    """Whether it could be stopped, so that a kill is what ends it: one that is on its way out by itself cannot."""
    process.suspend()
    while (status := process.status()) != psutil.STATUS_STOPPED:
        if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return False
        time.sleep(0.001)
    return True


def ended(everyone: list[psutil.Process], job: psutil.Popen) -> int:
    _, alive = psutil.wait_procs(everyone, timeout=GONE_SECONDS)
    for process in alive:
        process.kill()
    assert not alive, f"still running after {GONE_SECONDS} s: {alive}"
    return job.wait()


@pytest.fixture
def length(saved_model: Callable[[str], Path], tmp_path: Path) -> Callable[[str], float]:
    """How long an undisturbed run takes from the moment its ranks are there."""

    def measured(launcher: str) -> float:
        job = start(launcher, saved_model("llama"), tmp_path / "whole", tmp_path / "whole.log")
        while len(ranks_of(job)) < 2 and job.is_running():
            time.sleep(0.02)
        begin = time.monotonic()
        assert job.wait(120) == 0, (tmp_path / "whole.log").read_text()[-2000:]
        return time.monotonic() - begin

    return measured


@pytest.mark.parametrize(
    "launcher, moments",
    [
        pytest.param("tinygn", 2),
        pytest.param("tinygn", 10, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
        pytest.param("accelerate", 10, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_kill_of_one_rank_at_any_moment(saved_model, length, tmp_path: Path, launcher: str, moments: int):
    total, chance = length(launcher), random.Random(moments)
    for number in range(moments):
        out, log = tmp_path / f"out-{number}", tmp_path / f"{number}.log"
        victim, moment, everyone = chance.randrange(2), total * chance.random(), None
        while everyone is None:
            job = start(launcher, saved_model("llama"), out, log)
            everyone, moment = killed_after(moment, victim, job), moment / 2
            if everyone is None:
                assert job.wait(GONE_SECONDS) == 0, log.read_text()
                shutil.rmtree(out)
        code, told = ended(everyone, job), log.read_text()
        assert code != 0, told
        assert not out.exists() or (out / "tinygn_report.json").is_file(), f"half an output: {list(out.iterdir())}"
        if launcher == "tinygn":
            lines = [line for line in told.splitlines() if line.startswith("tinygn: ")]
            assert code == 128 + signal.SIGKILL and f"rank {victim} was killed by SIGKILL" in lines[-1], told
    again = start(launcher, saved_model("llama"), tmp_path / "out-0", tmp_path / "again.log")
    assert again.wait(120) == 0, (tmp_path / "again.log").read_text()[-2000:]
    left = [
        p.name for p in tmp_path.iterdir() if p.name.startswith(".partial-out-0-") or p.name == ".partial-out-0.lock"
    ]
    assert not left, "what the killed run left is cleared away by the next"


def test_ranks_do_not_outlive_a_killed_launcher(saved_model, tmp_path: Path):
    job = start("tinygn", saved_model("llama"), tmp_path / "out", tmp_path / "log")
    while not (tmp_path / ".partial-out.lock").exists() and job.is_running():
        time.sleep(0.02)
    everyone = [job, *job.children(recursive=True)]
    job.kill()
    ended(everyone, job)
    assert not (tmp_path / "out").exists()


def test_two_runs_into_one_output(saved_model, tmp_path: Path):
    """The second is told at once; the first is not disturbed."""
    out = tmp_path / "out"
    first = start("tinygn", saved_model("llama"), out, tmp_path / "first.log")
    while not (tmp_path / ".partial-out.lock").exists() and first.is_running():
        time.sleep(0.02)
    first.suspend(), [child.suspend() for child in first.children(recursive=True)]
    second = start("tinygn", saved_model("llama"), out, tmp_path / "second.log")
    code = second.wait(60)
    [child.resume() for child in first.children(recursive=True)], first.resume()
    told = [line for line in (tmp_path / "second.log").read_text().splitlines() if line.startswith("tinygn: ")]
    assert code == 2 and len(told) == 1 and "another run is writing output" in told[0] and str(out) in told[0]
    assert first.wait(120) == 0, (tmp_path / "first.log").read_text()[-2000:]
    assert json.loads((out / "tinygn_report.json").read_text())["num_processes"] == 2
    assert not list(tmp_path.glob(".partial-*"))


def test_the_lock_of_a_killed_build_is_deleted_but_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """torch waits for it without limit."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for size, other in (("2", True), ("4", False)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("WORLD_SIZE", size)
        stale, held, old = (tmp_path / name / "lock" for name in ("stale", "held", "old"))
        for lock in (stale, held, old):
            lock.parent.mkdir(exist_ok=True)
            lock.touch()
        os.utime(old, (0, 0))
        descriptor = os.open(held, os.O_RDONLY)  # as torch's FileBaton keeps it
        launcher.clear_stale_builds()
        os.close(descriptor)
        assert held.exists() and not old.exists()
        assert stale.exists() is not other  # with other machines it may be one of theirs
