"""The beginning of a user's own training script: what it makes its Accelerator of, and what ours says to it.

Words: `cpu` asks for the CPU, `sharding` lets FSDP2 and DeepSpeed shard on it; `trainer` lets transformers.Trainer make
the Accelerator. Prints "N ranks, BACKEND", or the refusal.
"""

import contextlib
import sys

from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from tests import tiny
from tinygn_dist import Compressor, load_config
from tinygn_dist.backends import sharding_on_cpu
from tinygn_dist.cli.main import leave
from tinygn_dist.errors import Refused

words = sys.argv[1:]
with sharding_on_cpu() if "sharding" in words else contextlib.nullcontext():
    if "trainer" in words:
        arguments = TrainingArguments(report_to=[], use_cpu="cpu" in words)
        accelerator = Trainer(tiny.build("llama"), arguments).accelerator
    else:
        accelerator = Accelerator(cpu="cpu" in words)
asked = {"model.name": "m", "distributed.num_processes": next((int(word) for word in words if word.isdigit()), None)}
try:
    backend = Compressor(load_config(overrides=asked), accelerator).backend
    message = f"{backend.num_ranks} ranks, {type(backend).__name__}"
except Refused as refused:
    message = str(refused)
print(f"\n{message}\n", end="", flush=True)
leave(0)
