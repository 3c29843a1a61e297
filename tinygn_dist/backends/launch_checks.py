"""Which launches are refused, and what to start instead: every message names a way that works from where it is read.

Three entries start a job. The command line (`tinygn compress`, launch/compress.py) makes the Accelerator itself, asks
for the CPU where there is no GPU, and shards there too. A user's own script makes its Accelerator, and a Trainer makes
one from TrainingArguments: on a machine without a GPU they have to ask for the CPU, or under FSDP2 and DeepSpeed make
it inside of `sharding_on_cpu()`."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig

from tinygn_dist.backends.collectives import world_size
from tinygn_dist.backends.launcher import sharding_asked
from tinygn_dist.errors import Refused

ACCEPTED = (
    "launch with configs/accelerate/cpu.yaml, ddp.yaml, fsdp2.yaml, hsdp.yaml, zero1.yaml, zero2.yaml or zero3.yaml"
)
_SHARD_ON_CPU = (
    "without a GPU, make the Accelerator or the TrainingArguments inside of `with sharding_on_cpu():`, from "
    "tinygn_dist.backends"
)
_REFUSED_AXES = {"tp": "tensor", "cp": "context", "sp": "sequence"}


def check_processes(accelerator: Accelerator, asked: int | None, callers_own: bool) -> None:
    """Refused when the processes found are not the ones that were launched and asked for, or do not shard as asked.

    asked: by the launcher or by distributed.num_processes. callers_own: the Accelerator is of a user's script."""
    found, launched, connected = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", 1)), world_size()
    if not found == launched == connected:
        raise Refused(
            f"the launcher started {launched} processes, torch.distributed connects {connected}, Accelerate sees "
            f"{found}; " + _how_to_connect(callers_own)
        )
    if asked is not None and asked != found:
        raise Refused(
            f"{asked} processes were asked for, {found} are running (`accelerate launch --cpu --num_processes N` "
            f"starts one); {_how_to_start(asked, callers_own)}"
        )
    wanted = sharding_asked()
    if wanted is not None and accelerator.distributed_type.value != wanted:
        raise Refused(
            f"{wanted} was asked for, Accelerate fell back to {accelerator.distributed_type.value}; start at least 2 "
            "processes, and leave ACCELERATE_USE_CPU, cpu=True and use_cpu unset: they turn sharding off without a word"
            + (f"; {_SHARD_ON_CPU}" if callers_own and not torch.cuda.is_available() else "")
        )


def _config_file() -> str:
    return f"configs/accelerate/{'ddp' if torch.cuda.is_available() else 'cpu'}.yaml"


def _how_to_connect(callers_own: bool) -> str:
    if not callers_own or torch.cuda.is_available():
        return f"launch with {_config_file()}, or `tinygn compress --num-processes N`"
    if sharding_asked():
        return _SHARD_ON_CPU
    return (
        "without a GPU, ask for the CPU: Accelerator(cpu=True), TrainingArguments(use_cpu=True), or "
        "ACCELERATE_USE_CPU=true in front of `accelerate launch`"
    )


def _how_to_start(asked: int, callers_own: bool) -> str:
    launch = f"`accelerate launch --config_file {_config_file()} --num_processes {asked}`"
    if not callers_own:
        return f"use {launch}, or `tinygn compress --num-processes {asked}`"
    own = "" if torch.cuda.is_available() else " and Accelerator(cpu=True)"
    return f"use {launch}{own}, or leave distributed.num_processes out"


def refuse_broken_sharding() -> None:
    """What would crash or misbehave in Accelerate's own constructor, seen in the environment its launcher sets."""
    if sharding_asked() == "FSDP":
        refuse_fsdp(int(os.environ.get("FSDP_VERSION", 1)))
    sizes = {axis: os.environ.get(f"PARALLELISM_CONFIG_{axis.upper()}_SIZE", 1) for axis in _REFUSED_AXES}
    _refuse_axes({axis: int(size) for axis, size in sizes.items()})


def refuse_fsdp(version: int) -> None:
    if version != 2:
        raise Refused(
            "launched with FSDP version 1, accepted: version 2 (set fsdp_version: 2); launch with "
            "configs/accelerate/fsdp2.yaml"
        )


def refuse_parallelism(asked: ParallelismConfig | None) -> None:
    if asked is not None:
        _refuse_axes({axis: getattr(asked, f"{axis}_size", 1) for axis in _REFUSED_AXES})


def _refuse_axes(sizes: dict[str, int]) -> None:
    """Ranks along these axes share one batch, or hold pieces that are not whole rows."""
    for axis, size in sizes.items():
        if size > 1:
            raise Refused(
                f"launched with {_REFUSED_AXES[axis]} parallelism of {size}, accepted: {axis}_size 1; launch with "
                "configs/accelerate/fsdp2.yaml, or hsdp.yaml for several nodes"
            )


def refuse_nvme(engine: dict[str, Any]) -> None:
    for what in ("offload_param", "offload_optimizer"):
        if (engine.get("zero_optimization", {}).get(what) or {}).get("device") == "nvme":
            raise Refused(
                f"zero_optimization.{what} on nvme, where masks do not reach the weights, accepted: cpu; or use one "
                "process with --distributed.offload disk"
            )


def refuse_offload(asked: str, accelerator: Accelerator, callers_own: bool) -> None:
    if callers_own:
        raise Refused(
            f"distributed.offload {asked} inside your own training, whose optimizer would step weights that are not "
            "there; use `tinygn compress`, or shard the weights with configs/accelerate/fsdp2.yaml"
        )
    if accelerator.num_processes > 1 or sharding_asked():
        raise Refused(
            f"distributed.offload {asked} on {accelerator.num_processes} processes, accepted: one; several share the "
            "weights with configs/accelerate/fsdp2.yaml or zero3.yaml"
        )
    if accelerator.mixed_precision != "no":
        raise Refused(
            f"distributed.offload {asked} with mixed precision {accelerator.mixed_precision}, accepted: no; give the "
            "weights that dtype with --model.dtype"
        )
