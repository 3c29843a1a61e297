"""One `make_backend`, the only place that looks at how the job was launched."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.replicated import Replicated
from tinygn_dist.config import DistributedConfig
from tinygn_dist.errors import Refused

__all__ = ["Backend", "make_backend"]


def make_backend(options: DistributedConfig, accelerator: Accelerator | None = None) -> Backend:
    """The backend of this job, from its launcher's settings or from the caller's own Accelerator.

    Raises Refused when the processes found are not the processes that were asked for: several CPU launches of
    Accelerate start one process, or several that do not know of each other, and exit 0.
    """
    if accelerator is None:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            log_with=list(options.trackers) or None,
            project_dir="tracking" if options.trackers else None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=options.timeout_seconds))],
        )
    _check_processes(accelerator, options.num_processes)
    match accelerator.distributed_type:
        case DistributedType.NO | DistributedType.MULTI_CPU | DistributedType.MULTI_GPU:
            return Replicated(accelerator)
        case other:
            raise Refused(
                f"launched as {other.value}, accepted: one process or DDP; "
                "launch with configs/accelerate/cpu.yaml or ddp.yaml"
            )


def _check_processes(accelerator: Accelerator, asked: int | None) -> None:
    found = accelerator.num_processes
    launched = int(os.environ.get("WORLD_SIZE", 1))
    connected = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if not found == launched == connected:
        raise Refused(
            f"the launcher started {launched} processes, torch.distributed connects {connected}, Accelerate sees {found}; "
            "launch with configs/accelerate/cpu.yaml (no GPU) or ddp.yaml, or `tinygn compress --num-processes N`"
        )
    if asked is not None and asked != found:
        raise Refused(
            f"{asked} processes were asked for, {found} are running (`accelerate launch --cpu --num_processes N` starts "
            "one); launch with configs/accelerate/cpu.yaml, or `tinygn compress --num-processes N`"
        )
    for wanted, env in (("FSDP", "ACCELERATE_USE_FSDP"), ("DEEPSPEED", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(env, "false").lower() == "true" and accelerator.distributed_type.value != wanted:
            raise Refused(
                f"{wanted} was asked for, Accelerate fell back to {accelerator.distributed_type.value}; on a machine "
                "without a GPU use configs/accelerate/cpu.yaml"
            )
