"""Start connected processes on this machine, for the console script's --num-processes."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def launch(module: str, arguments: Sequence[str], num_processes: int) -> int:
    """Run `python -m module arguments` in N processes that know each other; returns the exit code.

    The code is that of the process that failed first. The elastic agent's own report is left out: the process has
    said what went wrong.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    asked = ["--standalone", "--nproc_per_node", str(num_processes), "-m", module, *arguments]
    try:
        torchrun.run(torchrun.parse_args(asked))
    except SignalException as stopped:  # the processes got the signal too, and the time to save
        return 75 if stopped.sigval == signal.SIGTERM else 128 + stopped.sigval
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0
