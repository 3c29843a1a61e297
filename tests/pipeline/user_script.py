"""A training script as users have them; the lines marked with # + are what compression adds."""

import sys

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinygn_dist import Compressor, load_config  # +

folder, data, out, *overrides = sys.argv[1:]
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
assert accelerator.num_processes == 2
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

asked = {"model.name": folder, "data.name": data, "data.seq_len": 32, "data.num_samples": 4, "prune.multiple_of": 8}
config = load_config(overrides=asked | dict(pair.split("=") for pair in overrides))
compressor = Compressor(config, accelerator)  # +
model = compressor.compress(model, tokenizer)  # +

optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
rows = [{"input_ids": torch.randint(3, 128, (12,), generator=torch.Generator().manual_seed(i))} for i in range(16)]
loader = torch.utils.data.DataLoader(rows, batch_size=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
compressor.attach(model, optimizer)  # +

losses = []
for _ in range(3):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch, labels=batch["input_ids"]).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
assert sum(losses[-4:]) < sum(losses[:4]), losses

compressor.save_pretrained(model, out, tokenizer)  # +
accelerator.end_training()
