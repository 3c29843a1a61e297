"""How was the job started? Its processes: started, counted as its launcher was asked for them, and ended together.

The launcher says what it was asked for in two places: its own command line, which is the parent process of a rank, and
the environment that it sets. What must be right before ranks work is here too: builds that were killed, the same code
on every rank, and Accelerate's switch for sharding on a machine without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest import mock

import psutil
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.utils.cpp_extension import get_default_build_root

log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}
_LAUNCHERS = {  # name of a program or module -> the words between it and the launcher's arguments
    "accelerate": ["launch"],
    "accelerate.commands.accelerate_cli": ["launch"],
    "accelerate-launch": [],
    "accelerate.commands.launch": [],
}
_LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed")
_LONGEST_BUILD_SECONDS = 600


# -- processes on this machine -----------------------------------------------------------------------------------------
def launch(module: str, arguments: Sequence[str], num_processes: int) -> tuple[int, str | None]:
    """Run `python -m module arguments` in N processes that know each other; returns (exit code, a message that no
    process could write).

    The code is that of the process that failed first. The elastic agent's own report is left out: a process that fails
    says what went wrong, unless it was killed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    words = ["--standalone", "--nproc_per_node", str(num_processes), "-m", module, *arguments]
    try:
        torchrun.run(torchrun.parse_args(words))
    except SignalException as stopped:  # the processes got the signal too, and the time to save
        return (75 if stopped.sigval == signal.SIGTERM else 128 + stopped.sigval), None
    except ChildFailedError as error:
        rank, first = min(error.failures.items(), key=lambda failure: failure[1].timestamp)
        if first.exitcode > 0:
            return first.exitcode, None
        name = signal.Signals(-first.exitcode).name
        return 128 - first.exitcode, (
            f"rank {rank} was killed by {name}, the others were stopped, no output was written; out of memory is the "
            "usual cause of SIGKILL"
        )
    return 0, None


def end_with_launcher() -> None:
    """Ask the system (Linux) to end this rank when the launcher that started it is gone: an elastic agent that is
    killed leaves its ranks running."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # SIGTERM asks to save first


# -- what the launcher was asked for -----------------------------------------------------------------------------------
def accelerate_arguments() -> list[str] | None:
    """Arguments of the `accelerate launch` that is our parent process; None where it is something else."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    for index, word in enumerate(words[:5]):  # behind the interpreter and its switches
        between = _LAUNCHERS.get(os.path.basename(word))
        if between is not None and words[index + 1 :][: len(between)] == between:
            return words[index + 1 + len(between) :]
    return None


def processes_asked(arguments: Sequence[str]) -> int | None:
    """How many processes, over all machines, these arguments of `accelerate launch` ask for; None where they leave it
    open. Accelerate's own parser and rules say so: flags go before the config file, named or default, and words behind
    the script are the script's. It may start fewer: on a CPU several ways of asking for two start one."""
    logger, parser = accelerate_launch.logger, accelerate_launch.launch_command_parser()
    try:
        with mock.patch.object(logger, "warning"):  # about defaults, which the launcher itself has said
            found, _, _ = accelerate_launch._validate_launch_command(parser.parse_args(list(arguments)))
    except OSError:  # a config file that only the launcher could read, such as a pipe
        return None
    return found.num_processes or None  # 0: a machine without a GPU


def sharding_asked() -> str | None:
    """FSDP or DEEPSPEED when the launcher asked for it, else None."""
    return next((kind for kind, env in _SHARDING.items() if os.environ.get(env, "false").lower() == "true"), None)


@contextlib.contextmanager
def sharding_on_cpu(asked: str | None = None) -> Iterator[None]:
    """Inside, an Accelerator built for a launch that asks for FSDP or DeepSpeed really shards on a machine without a
    GPU. Does nothing on other machines and launches. asked: FSDP or DEEPSPEED, where the launcher does not say it but
    the caller's own Accelerator or TrainingArguments.

    Accelerate 1.15 turns FSDP on only where it finds a GPU: on a CPU the same launch silently becomes DDP (with
    `cpu=True`) or unconnected processes (without), and DeepSpeed's processes are counted as one. It has no option for
    this, so while the Accelerator is made it is told that the backend is gloo and the device a CPU. Everything after
    that (sharding, accumulation, clipping, checkpoints) is Accelerate's own code, as on a GPU.
    """
    asked = asked or sharding_asked()
    if asked is None or torch.cuda.is_available() or int(os.environ.get("LOCAL_RANK", -1)) == -1:
        yield
        return
    # AcceleratorState turns MULTI_GPU into FSDP by itself; for DeepSpeed the type is set before this is asked
    kind = DistributedType.MULTI_GPU if asked == "FSDP" else DistributedType.NO
    with (
        mock.patch.object(PartialState, "_prepare_backend", lambda self, *_, **__: ("gloo", kind)),
        mock.patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": "cpu"}),
    ):
        yield


# -- what has to be right before ranks work ----------------------------------------------------------------------------
@functools.cache
def code_in_use() -> dict[str, str]:
    """Which code this rank runs: nodes of a cluster are installed one by one, and one that was left behind gives other
    masks. Of this package a digest of its sources, which a version number does not tell apart while it is worked on; of
    the libraries that compute, their versions."""
    digest, home = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(home.rglob("*.py")):
        digest.update(f"{path.relative_to(home)}\0".encode() + path.read_bytes() + b"\0")
    return {"the sources of tinygn_dist": digest.hexdigest()[:16]} | {
        f"the version of {name}": _version(name) for name in _LIBRARIES
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def clear_stale_builds() -> None:
    """Delete locks in torch's folder of compiled extensions that no process holds any more: DeepSpeed compiles parts of
    itself at first use, and waits without limit for the lock of a build that was killed.

    torch keeps a lock's file open while it builds. A lock that no process of this machine has open is stale, unless
    the job has other machines that may share the folder: then it has to be older than any build lasts.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [path for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)]
    if not locks:
        return
    opened, one_machine = _opened_files(), os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    for lock in locks:
        try:
            age = time.time() - lock.stat().st_mtime
            if str(lock.resolve()) not in opened and (one_machine or age > _LONGEST_BUILD_SECONDS):
                lock.unlink()
                log.warning("deleted %s, left by a build that was killed", lock)
        except OSError:  # another rank was faster, or it is somebody else's
            continue


def _opened_files() -> set[str]:
    opened: set[str] = set()
    for process in psutil.process_iter():
        try:
            opened.update(file.path for file in process.open_files())
        except psutil.Error:  # ended, or of another user, whose builds are in another folder
            continue
    return opened
