"""How is a model spread over processes? One `make_backend`, the only place that looks at how the job was launched."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from tinygn_dist.backends import launch_checks
from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.collectives import world_size
from tinygn_dist.backends.launcher import (
    clear_stale_builds,
    code_in_use,
    end_with_launcher,
    sharding_asked,
    sharding_on_cpu,
)
from tinygn_dist.backends.offload import Offloaded
from tinygn_dist.backends.replicated import Replicated
from tinygn_dist.config import DistributedConfig
from tinygn_dist.errors import Refused, UserError

__all__ = ["Backend", "make_backend", "sharding_on_cpu", "world_size"]


def make_backend(options: DistributedConfig, accelerator: Accelerator | None = None) -> Backend:
    """The backend of this job, from its launcher's settings or from the caller's own Accelerator. A collective.

    Raises Refused when the processes found are not the processes that were asked for: several CPU launches of
    Accelerate start one process, or several that do not know of each other, and exit 0. UserError when ranks run
    different code.
    """
    callers_own = accelerator is not None
    if accelerator is None:
        launch_checks.refuse_broken_sharding()
        end_with_launcher()
        if sharding_asked() == "DEEPSPEED":
            clear_stale_builds()
        with sharding_on_cpu(), _connecting(options.timeout_seconds):
            accelerator = Accelerator(
                cpu=not torch.cuda.is_available() and sharding_asked() is None,
                log_with=list(options.trackers) or None,
                project_dir="tracking" if options.trackers else None,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=options.timeout_seconds))],
            )
    launch_checks.check_processes(accelerator, options.num_processes, callers_own)
    launch_checks.refuse_parallelism(accelerator.parallelism_config)
    if options.offload != "none":
        launch_checks.refuse_offload(options.offload, accelerator, callers_own)
    backend = _backend_of(accelerator, options)
    for what, found in code_in_use().items():
        backend.agree(found, what)
    return backend


def _backend_of(accelerator: Accelerator, options: DistributedConfig) -> Backend:
    match accelerator.distributed_type:
        case DistributedType.NO | DistributedType.MULTI_CPU | DistributedType.MULTI_GPU:
            return Replicated(accelerator) if options.offload == "none" else Offloaded(accelerator, options)
        case DistributedType.FSDP:
            launch_checks.refuse_fsdp(2 if accelerator.is_fsdp2 else 1)
            from tinygn_dist.backends.fsdp2 import FSDP2

            return FSDP2(accelerator)
        case DistributedType.DEEPSPEED:
            from tinygn_dist.backends.zero import ZeroOptimizer, ZeroParameters  # deepspeed is an optional dependency

            launch_checks.refuse_nvme(accelerator.state.deepspeed_plugin.deepspeed_config)
            match accelerator.state.deepspeed_plugin.zero_stage:
                case 1 | 2:
                    return ZeroOptimizer(accelerator)
                case 3:
                    return ZeroParameters(accelerator)
                case stage:
                    raise Refused(
                        f"launched with DeepSpeed ZeRO stage {stage}, accepted: 1, 2 and 3; {launch_checks.ACCEPTED}"
                    )
        case other:
            raise Refused(
                f"launched as {other.value}, accepted: one process, DDP, FSDP2 and DeepSpeed ZeRO; "
                f"{launch_checks.ACCEPTED}"
            )


@contextlib.contextmanager
def _connecting(seconds: float) -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        said = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the processes of the job did not find each other in {seconds:g} s ({said}); see what the other ranks and "
            "nodes said, and check the address and port of the first node"
        ) from error
