"""The processes of a job on this machine: started for the console script's --num-processes, and ended together."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launch(module: str, arguments: Sequence[str], num_processes: int) -> tuple[int, str | None]:
    """Run `python -m module arguments` in N processes that know each other; returns (exit code, what nobody has told).

    The code is that of the process that failed first. The elastic agent's own report is left out: a process that fails
    says what went wrong, unless it was killed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    asked = ["--standalone", "--nproc_per_node", str(num_processes), "-m", module, *arguments]
    try:
        torchrun.run(torchrun.parse_args(asked))
    except SignalException as stopped:  # the processes got the signal too, and the time to save
        return (75 if stopped.sigval == signal.SIGTERM else 128 + stopped.sigval), None
    except ChildFailedError as error:
        rank, first = min(error.failures.items(), key=lambda failure: failure[1].timestamp)
        if first.exitcode > 0:
            return first.exitcode, None
        name = signal.Signals(-first.exitcode).name
        return 128 - first.exitcode, (
            f"rank {rank} was killed by {name}, the others were stopped, no output was written; out of memory is the usual cause of SIGKILL"
        )
    return 0, None


def end_with_launcher() -> None:
    """Ask the system (Linux) to end this rank when the launcher that started it is gone: an elastic agent that is killed
    leaves its ranks running."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # SIGTERM asks to save first
