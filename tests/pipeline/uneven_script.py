"""A user's training whose ranks have different numbers of batches: what Accelerate does about it, with masks
attached."""

import sys
from datetime import timedelta

import torch
from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs
from torch.distributed.algorithms.join import Join
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinygn_dist import Compressor, load_config
from tinygn_dist.cli.main import leave

folder, data, out, how, *overrides = sys.argv[1:]
accelerator = Accelerator(
    cpu=True,
    dataloader_config=DataLoaderConfiguration(even_batches=how == "padded"),
    kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=8))],
)
asked = {"model.name": folder, "data.name": data, "data.seq_len": 32, "data.num_samples": 4}
compressor = Compressor(load_config(overrides=asked | dict(pair.split("=") for pair in overrides)), accelerator)
model = compressor.compress(
    AutoModelForCausalLM.from_pretrained(folder), tokenizer := AutoTokenizer.from_pretrained(folder)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
rows = [{"input_ids": torch.randint(3, 128, (12,), generator=torch.Generator().manual_seed(i))} for i in range(5)]
model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(rows, batch_size=1))
compressor.attach(model, optimizer, num_steps=3)


def train() -> int:
    steps = 0
    for batch in loader:
        accelerator.backward(model(**batch, labels=batch["input_ids"]).loss)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


if how == "joined":
    with Join([model]):  # what accelerator.join_uneven_inputs does on GPUs; on CPUs it does nothing
        steps = train()
else:
    steps = train()
print(f"rank {accelerator.process_index}: {steps} steps", flush=True)
compressor.save_pretrained(model, out, tokenizer)
accelerator.end_training()
leave(0)  # gloo sometimes aborts in the teardown of a finished rank
