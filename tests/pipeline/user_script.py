"""A training script as users have them; the lines marked with # + are what compression adds."""

import copy
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinygn_dist import Compressor, load_config  # +
from tinygn_dist.backends.launcher import sharding_asked, sharding_on_cpu  # this test has no GPU
from tinygn_dist.cli.main import leave

EPOCHS, STEPS = 4, 8
folder, data, out, *overrides = sys.argv[1:]
with sharding_on_cpu():
    accelerator = Accelerator(cpu=sharding_asked() is None, gradient_accumulation_steps=2)
assert accelerator.num_processes == 2
asked = {"model.name": folder, "data.name": data, "data.seq_len": 32, "data.num_samples": 4, "prune.multiple_of": 8}
config = load_config(overrides=asked | dict(pair.split("=") for pair in overrides))
compressor = Compressor(config, accelerator)  # +

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
model = compressor.compress(model, tokenizer)  # +
average = copy.deepcopy(model)

norms = [p for name, p in model.named_parameters() if "norm" in name]
others = [p for name, p in model.named_parameters() if "norm" not in name]
groups = [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (4 * STEPS))
rows = [{"input_ids": torch.randint(3, 128, (12,), generator=torch.Generator().manual_seed(i))} for i in range(16)]
loader = torch.utils.data.DataLoader(rows, batch_size=2)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
compressor.attach(model, optimizer, num_steps=STEPS)  # +

state, start = Path(out).with_name("state"), 0
if state.exists():
    accelerator.load_state(state)
    start = EPOCHS // 2
losses, steps, sparsity = [], start * 2, []
for epoch in range(start, EPOCHS):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch, labels=batch["input_ids"]).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if accelerator.sync_gradients:
            steps += 1
            if sharding_asked() is None:
                for mean, now in zip(average.parameters(), accelerator.unwrap_model(model).parameters(), strict=True):
                    mean.data.lerp_(now.data, 0.1)
        if compressor.masks is not None:  # what the test is about; users have no need of it
            masks = compressor.masks.masks
            assert masks.violations(model, compressor.backend) == 0, f"weights regrew in step {steps}"
            assert compressor.masks.steps == steps, (compressor.masks.steps, steps)
            kept = sum(masks.kept(compressor.backend).values())
            sparsity.append(round(1 - kept / sum(matrix.numel for matrix in masks.matrices), 3))
    if epoch + 1 == EPOCHS // 2 and start == 0:
        accelerator.save_state(state)
        accelerator.wait_for_everyone()
assert start or sum(losses[-4:]) < sum(losses[:4]), losses

compressor.save_pretrained(model, out, tokenizer)  # +
if sharding_asked() is None:
    compressor.mask_copy(average)
    average.save_pretrained(f"{out}-average", is_main_process=accelerator.is_main_process)
if accelerator.is_main_process:
    print("sparsity after each micro-batch:", sparsity, "in", accelerator.mixed_precision)
accelerator.wait_for_everyone()
accelerator.end_training()
leave(0)  # gloo sometimes aborts in the teardown of a finished rank
