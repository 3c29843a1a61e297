"""A fine-tuning script with transformers.Trainer as users have them; the lines marked with # + are what compression
adds. More words: `resume`, `best`."""

import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from tinygn_dist import load_config  # +
from tinygn_dist.backends.cpu_launch import sharding_asked, sharding_on_cpu  # this test has no GPU
from tinygn_dist.trainer import TinyGNCallback  # +

folder, data, out, *words = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.eos_token
rows = []
for number in range(32):
    ids = torch.randint(3, 128, (12,), generator=torch.Generator().manual_seed(number))
    rows.append({"input_ids": ids, "labels": ids})
best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True} if "best" in words else {}
with sharding_on_cpu():
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=8,
        save_steps=2,
        save_total_limit=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        weight_decay=0.1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_only_model=False,
        use_cpu=sharding_asked() is None,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        dataloader_pin_memory=False,
        **best,
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], processing_class=tokenizer)
asked = {"model.name": folder, "data.name": data, "data.seq_len": 32, "data.num_samples": 4}
asked |= {"prune.pattern": "unstructured", "prune.sparsity": 0.5, "prune.criterion": "magnitude"}
asked |= {"schedule.kind": "linear", "schedule.first": 0.2, "schedule.every": 2}
callback = TinyGNCallback(load_config(overrides=asked), trainer)  # +
trainer.add_callback(callback)  # +
trainer.train(resume_from_checkpoint="resume" in words)

masks = callback.compressor.masks
print("ranks", arguments.world_size, "history", [(update.step, round(update.sparsity, 2)) for update in masks.history])
print("logged", [round(seen["sparsity"], 2) for seen in trainer.state.log_history if "sparsity" in seen])
print("best", trainer.state.best_model_checkpoint)
whole = callback.compressor.backend.full_tensors(callback.compressor._model)
state = {name: tensor.detach().cpu().clone() for name, tensor in whole}
if trainer.is_world_process_zero():
    AutoModelForCausalLM.from_config(model.config).save_pretrained(f"{out}/final", state_dict=state)
trainer.accelerator.wait_for_everyone()
