"""What people put around or into a model before they train it: names, masks and files are those of the plain model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.conftest import ROOT
from tests.pipeline.conftest import launch_file
from tinygn_dist import Compressor, load_config
from tinygn_dist.backends.launcher import sharding_asked, sharding_on_cpu  # these tests have no GPU
from tinygn_dist.cli.main import leave
from tinygn_dist.errors import Refused, UserError


def plain(model: nn.Module) -> nn.Module:
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_layers(model: nn.Module) -> nn.Module:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def checkpointing(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def checkpoint_wrappers(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    return model


def adapters(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def frozen(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name or "norm" in name)
    return model


def adapters_compiled(model: nn.Module) -> nn.Module:
    return torch.compile(adapters(model), backend="eager")


COMPILED = (compiled, compiled_layers, adapters_compiled)
WRAPPED = (checkpointing, checkpoint_wrappers, adapters, frozen)


class Trained:
    """One model, wrapped, masked and trained for four optimizer steps of two micro-batches with clipping."""

    def __init__(
        self,
        folder: Path,
        data: Path,
        wrap: Callable,
        criterion: str,
        out: Path,
        accelerator: Accelerator | None = None,
    ) -> None:
        accelerator = accelerator or Accelerator(cpu=True, gradient_accumulation_steps=2)
        asked = {"model.name": str(folder), "data.name": str(data), "data.seq_len": 32, "data.num_samples": 4}
        asked |= {"prune.pattern": "unstructured", "prune.criterion": criterion, "prune.sparsity": 0.5}
        compressor = Compressor(load_config(overrides=asked), accelerator)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(0)
        model = compressor.compress(wrap(AutoModelForCausalLM.from_pretrained(folder)).train(), tokenizer)
        moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(moving, lr=0.05, momentum=0.9, weight_decay=0.1)
        rows = [{"input_ids": torch.randint(3, 128, (12,))} for _ in range(16 * accelerator.num_processes)]
        loader = torch.utils.data.DataLoader(rows, batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        compressor.attach(model, optimizer)
        masks, backend = compressor.masks.masks, compressor.backend
        self.fingerprint = masks.fingerprint(model, backend)
        self.chosen = {t.name: backend.gather(model, t, masks.by_name[t.name]).clone() for t in masks.matrices}
        before = [parameter.detach().clone() for parameter in moving]
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch, labels=batch["input_ids"]).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            assert masks.violations(model, backend) == 0
        if accelerator.num_processes == 1:
            assert not any(torch.equal(parameter, old) for parameter, old in zip(moving, before, strict=True))
        compressor.save_pretrained(model, out, tokenizer)
        accelerator.wait_for_everyone()
        self.saved = AutoModelForCausalLM.from_pretrained(out).state_dict()
        torch._dynamo.reset()


@pytest.mark.parametrize(
    "family, criterion, wrappers", [("llama-tied", "fisher", (*COMPILED, *WRAPPED)), ("llama", "obs", WRAPPED)]
)
def test_masks_and_files_are_those_of_the_plain_model(
    saved_model, text_file: Path, tmp_path: Path, family: str, criterion: str, wrappers: tuple
):
    """The solver's and the gradients' statistics come from hooks on modules, which a wrapper may hide or run twice."""
    folder, dense = saved_model(family), AutoModelForCausalLM.from_pretrained(saved_model(family)).state_dict()
    wanted = Trained(folder, text_file, plain, criterion, tmp_path / "plain")
    assert all(not torch.equal(weight, dense[name]) for name, weight in wanted.saved.items())
    assert wanted.saved.keys() == dense.keys()
    for wrap in wrappers:
        found = Trained(folder, text_file, wrap, criterion, tmp_path / wrap.__name__)
        assert found.fingerprint == wanted.fingerprint, wrap.__name__
        assert found.saved.keys() == dense.keys(), wrap.__name__
        for name, keep in found.chosen.items():
            assert torch.equal(keep, wanted.chosen[name]), (wrap.__name__, name)
            assert not found.saved[name][~keep].any(), (wrap.__name__, name)
        if wrap not in (adapters, adapters_compiled, frozen):  # which train something else
            for name, weight in wanted.saved.items():
                torch.testing.assert_close(found.saved[name], weight, msg=f"{wrap.__name__} {name}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, wrap", [("cpu", adapters_compiled), ("fsdp2", adapters), ("zero2", adapters), ("zero3", adapters)]
)
def test_adapters_on_two_ranks(saved_model, text_file: Path, tmp_path: Path, layout: str, wrap: Callable):
    """Adapters train, sharded or not; the base model's masks are those of one process and its kept weights
    untouched."""
    folder = saved_model("llama")
    wanted = Trained(folder, text_file, plain, "fisher", tmp_path / "plain")
    words = ["--config_file", launch_file(layout, tmp_path), "--main_process_port", 0, __file__]
    words += [folder, text_file, tmp_path / "out", wrap.__name__]
    env = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert wanted.fingerprint in done.stdout
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    dense = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert found.keys() == dense.keys()
    for name, weight in dense.items():
        keep = wanted.chosen.get(name, torch.ones_like(weight, dtype=torch.bool))
        assert torch.equal(found[name], weight * keep), name


def test_units_of_a_wrapped_model_are_refused(saved_model, text_file: Path):
    config = load_config(overrides={"model.name": "m", "data.name": str(text_file), "prune.pattern": "channels"})
    model = adapters(AutoModelForCausalLM.from_pretrained(saved_model("llama")))
    with pytest.raises(UserError, match="a model in PeftModel; compress the plain model first"):
        Compressor(config, Accelerator(cpu=True)).compress(model, None)


def test_a_model_with_a_device_map_is_refused(saved_model, tmp_path: Path):
    folder = saved_model("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=tmp_path / "off")
    compressor = Compressor(load_config(overrides={"model.name": str(folder)}), Accelerator(cpu=True))
    with pytest.raises(Refused, match=r"device_map \(disk\), accepted: a whole model.*--distributed.offload cpu"):
        compressor.compress(model, None)


if __name__ == "__main__":  # one of the ranks of test_adapters_on_two_ranks
    with sharding_on_cpu():
        started = Accelerator(cpu=sharding_asked() is None, gradient_accumulation_steps=2)
    assert started.num_processes == 2
    model, data, out, wrapper = sys.argv[1:]
    done = Trained(Path(model), Path(data), globals()[wrapper], "fisher", Path(out), started)
    print(done.fingerprint, flush=True)
    started.wait_for_everyone()
    started.end_training()
    leave(0)  # gloo sometimes aborts in the teardown of a finished rank
