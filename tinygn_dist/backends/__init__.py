"""How is a model spread over processes? One `make_backend`, the only place that looks at how the job was launched."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.code import code_in_use
from tinygn_dist.backends.collectives import world_size
from tinygn_dist.backends.cpu_launch import sharding_asked, sharding_on_cpu
from tinygn_dist.backends.extension_builds import clear_stale_builds
from tinygn_dist.backends.launcher import end_with_launcher
from tinygn_dist.backends.offload import Offloaded
from tinygn_dist.backends.replicated import Replicated
from tinygn_dist.config import DistributedConfig
from tinygn_dist.errors import Refused, UserError

__all__ = ["Backend", "make_backend", "world_size"]

_ACCEPTED = (
    "launch with configs/accelerate/cpu.yaml, ddp.yaml, fsdp2.yaml, hsdp.yaml, zero1.yaml, zero2.yaml or zero3.yaml"
)
_REFUSED_AXES = {"tp": "tensor", "cp": "context", "sp": "sequence"}


def make_backend(options: DistributedConfig, accelerator: Accelerator | None = None) -> Backend:
    """The backend of this job, from its launcher's settings or from the caller's own Accelerator. A collective.

    Raises Refused when the processes found are not the processes that were asked for: several CPU launches of
    Accelerate start one process, or several that do not know of each other, and exit 0. UserError when ranks run
    different code.
    """
    callers_own = accelerator is not None
    if accelerator is None:
        _refuse_launch()
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
    _check_processes(accelerator, options.num_processes)
    if accelerator.parallelism_config is not None:
        _refuse_parallelism(
            {axis: getattr(accelerator.parallelism_config, f"{axis}_size", 1) for axis in _REFUSED_AXES}
        )
    if options.offload != "none":
        _refuse_offload(options.offload, accelerator, callers_own)
    backend = _backend_of(accelerator, options)
    for what, found in code_in_use().items():
        backend.agree(found, what)
    return backend


def _backend_of(accelerator: Accelerator, options: DistributedConfig) -> Backend:
    match accelerator.distributed_type:
        case DistributedType.NO | DistributedType.MULTI_CPU | DistributedType.MULTI_GPU:
            return Replicated(accelerator) if options.offload == "none" else Offloaded(accelerator, options)
        case DistributedType.FSDP:
            _refuse_fsdp(2 if accelerator.is_fsdp2 else 1)
            from tinygn_dist.backends.fsdp2 import FSDP2

            return FSDP2(accelerator)
        case DistributedType.DEEPSPEED:
            from tinygn_dist.backends.zero import ZeroOptimizer, ZeroParameters  # deepspeed is an optional dependency

            _refuse_nvme(accelerator.state.deepspeed_plugin.deepspeed_config)
            match accelerator.state.deepspeed_plugin.zero_stage:
                case 1 | 2:
                    return ZeroOptimizer(accelerator)
                case 3:
                    return ZeroParameters(accelerator)
                case stage:
                    raise Refused(f"launched with DeepSpeed ZeRO stage {stage}, accepted: 1, 2 and 3; {_ACCEPTED}")
        case other:
            raise Refused(
                f"launched as {other.value}, accepted: one process, DDP, FSDP2 and DeepSpeed ZeRO; {_ACCEPTED}"
            )


@contextlib.contextmanager
def _connecting(seconds: float) -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        said = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the processes of the job did not find each other in {seconds:g} s ({said}); see what the other ranks and nodes "
            "said, and check the address and port of the first node"
        ) from error


def _refuse_launch() -> None:
    """What would crash or misbehave in Accelerate's own constructor, seen in the environment its launcher sets."""
    if sharding_asked() == "FSDP":
        _refuse_fsdp(int(os.environ.get("FSDP_VERSION", 1)))
    sizes = {axis: os.environ.get(f"PARALLELISM_CONFIG_{axis.upper()}_SIZE", 1) for axis in _REFUSED_AXES}
    _refuse_parallelism({axis: int(size) for axis, size in sizes.items()})


def _refuse_fsdp(version: int) -> None:
    if version != 2:
        raise Refused(
            "launched with FSDP version 1, accepted: version 2 (set fsdp_version: 2); launch with "
            "configs/accelerate/fsdp2.yaml"
        )


def _refuse_parallelism(sizes: dict[str, int]) -> None:
    """Ranks along these axes share one batch, or hold pieces that are not whole rows."""
    for axis, size in sizes.items():
        if size > 1:
            raise Refused(
                f"launched with {_REFUSED_AXES[axis]} parallelism of {size}, accepted: {axis}_size 1; launch with "
                "configs/accelerate/fsdp2.yaml, or hsdp.yaml for several nodes"
            )


def _refuse_nvme(engine: dict[str, Any]) -> None:
    for what in ("offload_param", "offload_optimizer"):
        if (engine.get("zero_optimization", {}).get(what) or {}).get("device") == "nvme":
            raise Refused(
                f"zero_optimization.{what} on nvme, where masks do not reach the weights, accepted: cpu; or use one process "
                "with --distributed.offload disk"
            )


def _refuse_offload(asked: str, accelerator: Accelerator, callers_own: bool) -> None:
    if callers_own:
        raise Refused(
            f"distributed.offload {asked} inside your own training, whose optimizer would step weights that are not there; "
            "use `tinygn compress`, or shard the weights with configs/accelerate/fsdp2.yaml"
        )
    if accelerator.num_processes > 1 or sharding_asked():
        raise Refused(
            f"distributed.offload {asked} on {accelerator.num_processes} processes, accepted: one; several share the weights "
            "with configs/accelerate/fsdp2.yaml or zero3.yaml"
        )
    if accelerator.mixed_precision != "no":
        raise Refused(
            f"distributed.offload {asked} with mixed precision {accelerator.mixed_precision}, accepted: no; give the weights "
            "that dtype with --model.dtype"
        )


def _check_processes(accelerator: Accelerator, asked: int | None) -> None:
    found = accelerator.num_processes
    launched = int(os.environ.get("WORLD_SIZE", 1))
    connected = world_size()
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
    wanted = sharding_asked()
    if wanted is not None and accelerator.distributed_type.value != wanted:
        raise Refused(
            f"{wanted} was asked for, Accelerate fell back to {accelerator.distributed_type.value}; start at "
            "least 2 processes, and leave ACCELERATE_USE_CPU and use_cpu unset: they turn sharding off without a word"
        )
