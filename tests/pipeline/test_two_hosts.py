"""launch/slurm.sbatch on two hosts that reach each other by a network only: a real rendezvous of two launchers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.pipeline.conftest import SMALL, report_of

HOSTS = ROOT / "tests/pipeline/two_hosts.sh"
FIRST = "10.77.0.1"
SLURM = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "two", "SLURM_JOB_ID": "7", "PROCESSES_PER_NODE": "1"}
WORDS = [*SMALL, "--pattern=2:4", "--criterion=wanda", "--recover-steps=3", "--distributed.timeout_seconds=30"]
SECONDS = 240


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    """Skips where the system does not let us have hosts of our own, and says why."""
    missing = [tool for tool in ("unshare", "nsenter", "ip") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"two hosts in network namespaces need {missing[0]}")
    words = ["unshare", "-rnmpf", "--mount-proc", "--kill-child"]
    words += ["ip", "link", "add", "cable", "type", "veth", "peer", "name", "end"]
    tried = subprocess.run(words, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no network namespaces here: {tried.stderr.strip()}")


@pytest.fixture
def sbatch(tmp_path: Path):
    """sbatch(layout, *words): launch/slurm.sbatch, started, with an srun that runs on the two hosts."""
    programs = {
        "srun": f'shift\nexec unshare -rnmpf --mount-proc --kill-child {HOSTS} {tmp_path} "$@"\n',
        "scontrol": f"printf '{FIRST}\\n10.77.0.2\\n'\n",
        "accelerate": f'exec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text("#!/usr/bin/env bash\n" + body)
        (tmp_path / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "SLURM", "FSDP", "GLOO"))}
    clean |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **SLURM}

    def start(layout: str, *words: str) -> psutil.Popen:
        env = clean | {"CONFIG": f"configs/accelerate/{layout}.yaml"}
        started = ["bash", "launch/slurm.sbatch", *words]
        return psutil.Popen(started, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def said(folder: Path) -> str:
    return "\n".join((folder / f"host-{number}.log").read_text()[-2000:] for number in (0, 1))


@pytest.mark.parametrize("layout", ["fsdp2", pytest.param("cpu", marks=pytest.mark.slow)])
def test_two_hosts_give_the_result_of_one_process(sbatch, compress, saved_model, tmp_path: Path, layout: str):
    model = saved_model("llama")
    job = sbatch(layout, f"--model={model}", f"--output={tmp_path / 'two'}", *WORDS)
    told, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == 0 and "exit codes 0 0" in told, told + said(tmp_path)
    assert compress(model, tmp_path / "one", *WORDS).code == 0
    two, one = report_of(tmp_path / "two"), report_of(tmp_path / "one")
    assert (two["num_processes"], one["num_processes"]) == (2, 1)
    assert two["selection"] == one["selection"]
    assert two["after"]["loss"] == pytest.approx(one["after"]["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_rank_that_is_killed_on_one_host_ends_the_other(sbatch, saved_model, tmp_path: Path):
    words = [*WORDS, "--recover-steps=4000"]
    job = sbatch("fsdp2", f"--model={saved_model('llama')}", f"--output={tmp_path / 'out'}", *words)
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / ".partial-out.lock").exists():
        assert time.monotonic() < deadline and job.poll() is None, said(tmp_path)
        time.sleep(0.05)
    everyone = job.children(recursive=True)
    (victim,) = (p for p in everyone if "compress.py" in " ".join(p.cmdline()[:4]) and p.environ().get("RANK") == "1")
    victim.kill()
    told, _ = job.communicate(timeout=90)
    codes = told.rpartition("exit codes ")[2].split()
    assert len(codes) == 2 and "0" not in codes and job.returncode != 0, told + said(tmp_path)
    _, alive = psutil.wait_procs(everyone, timeout=30)
    assert not alive and not (tmp_path / "out").exists()
