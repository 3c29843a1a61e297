"""A fine-tuning script with transformers.Trainer as users have them; the lines marked with # + are what compression
adds. More words: `resume`, `best`; `fsdp`, `zero2`, `zero3` (asked for in TrainingArguments); `sft` (TRL's
SFTTrainer); `memory` (the device runs out of it in the third step until a micro-batch is one sequence)."""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from tinygn_dist import load_config  # +
from tinygn_dist.backends.launcher import sharding_asked, sharding_on_cpu  # this test has no GPU
from tinygn_dist.cli.main import leave
from tinygn_dist.integrations.trainer import TinyGNCallback  # +

folder, data, out, *words = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.eos_token
rows = []
for number in range(32):
    ids = torch.randint(3, 128, (12,), generator=torch.Generator().manual_seed(number))
    rows.append({"input_ids": ids, "labels": ids})
make_arguments, make_trainer = TrainingArguments, Trainer
if "sft" in words:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    make_arguments, make_trainer = SFTConfig, SFTTrainer
    rows = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows])
best = {}
if "best" in words:  # the highest loss, so that it is neither the first model nor the last
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
sharding = {}
if "fsdp" in words:
    sharding = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}
for stage in {"zero2", "zero3"} & set(words):
    configs = Path(__file__).parents[2] / "configs/deepspeed"
    engine = json.loads((configs / f"{stage}.json").read_text(encoding="utf-8"))
    engine |= {name: "auto" for name in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu")}
    engine |= {"gradient_clipping": 1.0}
    sharding = {"deepspeed": engine}
asked_here = "FSDP" if "fsdp" in sharding else "DEEPSPEED" if sharding else sharding_asked()
with sharding_on_cpu(asked_here):
    arguments = make_arguments(
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
        use_cpu=asked_here is None,
        bf16=False,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        dataloader_pin_memory=False,
        auto_find_batch_size="memory" in words,
        **best,
        **sharding,
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    few = rows.select(range(4)) if "sft" in words else rows[:4]
    trainer = make_trainer(model, arguments, train_dataset=rows, eval_dataset=few, processing_class=tokenizer)
asked = {"model.name": folder, "data.name": data, "data.seq_len": 32, "data.num_samples": 4}
asked |= {"prune.pattern": "unstructured", "prune.sparsity": 0.5, "prune.criterion": "magnitude"}
asked |= {"schedule.kind": "linear", "schedule.first": 0.2, "schedule.every": 2}
callback = TinyGNCallback(load_config(overrides=asked), trainer)  # +
trainer.add_callback(callback)  # +
if "memory" in words:
    step, attempts = trainer.training_step, []

    def out_of_memory(*inputs, **named):
        if trainer.state.global_step == 2 and trainer._train_batch_size > 1:
            attempts.append(trainer._train_batch_size)
            raise RuntimeError("CUDA out of memory.")
        return step(*inputs, **named)

    trainer.training_step = out_of_memory
trainer.train(resume_from_checkpoint="resume" in words)

masks, state = callback.compressor.masks, trainer.state
told = [f"backend {type(callback.compressor.backend).__name__} ranks {arguments.world_size}"]
told += [f"history {[(update.step, round(update.sparsity, 2)) for update in masks.history]}"]
told += [f"logged {[round(seen['sparsity'], 2) for seen in state.log_history if 'sparsity' in seen]}"]
if "memory" in words:
    told += [f"attempts {attempts} hooks {len(callback.compressor._hooks)}"]
if "best" in words:
    now = trainer.evaluate()["eval_loss"]
    told += [f"best {state.best_model_checkpoint} loss {state.best_metric} now {now}"]
if trainer.is_world_process_zero():
    print("\n".join(told), flush=True)
whole = callback.compressor.backend.full_tensors(callback.compressor._model)
state = {name: tensor.detach().cpu().clone() for name, tensor in whole}
if trainer.is_world_process_zero():
    AutoModelForCausalLM.from_config(model.config).save_pretrained(f"{out}/final", state_dict=state)
trainer.accelerator.wait_for_everyone()
leave(0)  # gloo sometimes aborts in the teardown of a finished rank
