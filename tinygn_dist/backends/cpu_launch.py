"""FSDP2 and DeepSpeed on machines without a GPU, over gloo.

Accelerate 1.15 turns FSDP on only where it finds a GPU: on a CPU the same launch silently becomes DDP (with
`cpu=True`) or unconnected processes (without), and DeepSpeed's processes are counted as one. There is no option for it,
so for the moment of its construction the Accelerator is told that the backend is gloo and the device a CPU. Everything
after that (sharding, accumulation, clipping, checkpoints) is Accelerate's own code, as on a GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

_ASKED = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}


def sharding_asked() -> str | None:
    """FSDP or DEEPSPEED when the launcher asked for it, else None."""
    return next((kind for kind, env in _ASKED.items() if os.environ.get(env, "false").lower() == "true"), None)


@contextlib.contextmanager
def sharding_on_cpu(asked: str | None = None) -> Iterator[None]:
    """Inside, an Accelerator built for a launch that asks for FSDP or DeepSpeed really shards on a machine without a
    GPU. Does nothing on other machines and launches. asked: FSDP or DEEPSPEED, where the launcher does not say it but the
    caller's own Accelerator or TrainingArguments."""
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
