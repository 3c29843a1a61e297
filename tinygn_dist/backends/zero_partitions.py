"""ZeRO-3's parameters: what DeepSpeed keeps of a weight on each rank, and how to get at it."""

from __future__ import annotations

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import nn


def forget_models() -> None:
    """Engines leave their models in a global stack of running modules and in caches of a class, and with them
    every model that was ever placed. Between forwards none of it is needed."""
    FWD_MODULE_STACK.clear()
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def live_run(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's run of a weight, with the padding behind it, which holds anything."""
    return parameter.ds_tensor.detach().view(-1)


def master_run(trained: DeepSpeedEngine, parameter: nn.Parameter) -> torch.Tensor | None:
    """The fp32 master of this rank's run, a view; None for a frozen parameter."""
    if not parameter.requires_grad:
        return None
    return trained.optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)[0].detach().view(-1)


def drop_whole(parameter: nn.Parameter) -> None:
    """Small weights stay whole in training (persistence threshold), which would hide an edit of the shard."""
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:
        parameter.ds_active_sub_modules.clear()  # the last backward leaves its marks on them
        parameter.partition()
