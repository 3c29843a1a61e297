"""More ranks than GPUs, for tests on a machine with one: gloo in place of NCCL, which wants a GPU for each rank."""

from __future__ import annotations

import os

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def share_cards() -> None:
    """To be called on every rank before its Accelerator is made. Does nothing where each rank has a GPU, or none has
    one."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cards and int(os.environ.get("WORLD_SIZE", "1")) > cards:
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % cards)
        PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
