"""A model made empty and filled from its checkpoint is the model that `from_pretrained` loads, in every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from tests import tiny
from tests.contract import sharded_job
from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.pieces import filled, tensors_of
from tinygn_dist.checkpoints import load, sharded_load
from tinygn_dist.config import ModelConfig

MODEL_FILE = "model.safetensors"


def same(one: nn.Module, other: nn.Module) -> None:
    named = [dict([*m.named_parameters(remove_duplicate=False), *m.named_buffers()]) for m in (one, other)]
    assert named[0].keys() == named[1].keys()
    for name, tensor in named[0].items():
        assert tensor.dtype == named[1][name].dtype and torch.equal(tensor, named[1][name]), name
    assert one.config.to_dict() == other.config.to_dict() and one.training == other.training
    assert [len(tensors_of(m)) for m in (one, other)] == [len(tensors_of(one))] * 2  # tied as before


def both(
    folder: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch, **options: str
) -> tuple[nn.Module, nn.Module]:
    """(filled from pieces, loaded whole); the first without ever asking for the second."""
    source = load.find_model(ModelConfig(name=str(folder), **options))
    whole = load.load_model(source)
    with monkeypatch.context() as patched:
        patched.setattr(load, "load_model", None)
        return filled(*sharded_load.from_checkpoint(source, backend).take_empty()), whole


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_filled_in_pieces_or_loaded_whole(backend: Backend, saved_model, monkeypatch, family: str, dtype: str):
    same(*both(saved_model(family), backend, monkeypatch, dtype=dtype, task=tiny.task_of(family)))


def test_experts_stored_one_by_one_are_joined(backend: Backend, monkeypatch, tmp_path: Path):
    with torch.random.fork_rng():
        sharded_job.mixtral().save_pretrained(tmp_path)
    stored = load_file(tmp_path / MODEL_FILE)
    assert any("experts.2.w1" in name for name in stored)
    same(*both(tmp_path, backend, monkeypatch))


def test_the_generation_config_of_the_checkpoint_comes_with_it(backend: Backend, monkeypatch, tmp_path: Path):
    model = tiny.build("llama")
    model.generation_config = hf.GenerationConfig(max_new_tokens=7, eos_token_id=2)
    model.save_pretrained(tmp_path)
    found, whole = both(tmp_path, backend, monkeypatch)
    assert found.generation_config.max_new_tokens == whole.generation_config.max_new_tokens == 7


def test_a_body_saved_without_its_head_prefix(backend: Backend, monkeypatch, tmp_path: Path):
    """Checkpoints of the bare model lack the prefix of the model with a head."""
    model = tiny.build("llama-tied")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / MODEL_FILE)
    save_file({n.removeprefix("model."): t for n, t in stored.items()}, tmp_path / MODEL_FILE, {"format": "pt"})
    found, whole = both(tmp_path, backend, monkeypatch)
    same(found, whole)
    assert tiny.same_bits(tiny.state_bytes(found), tiny.state_bytes(model))


def _drop(folder: Path) -> None:
    stored = load_file(folder / MODEL_FILE)
    del stored["model.norm.weight"]
    save_file(stored, folder / MODEL_FILE, {"format": "pt"})


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / MODEL_FILE), folder / "pytorch_model.bin")
    (folder / MODEL_FILE).unlink()


def _odd_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 56}))


@pytest.mark.parametrize("change", [_drop, _pickle, _odd_shape])
def test_what_cannot_be_read_in_pieces_is_loaded_whole_by_the_main_rank(
    backend: Backend, monkeypatch, tmp_path: Path, change: Callable[[Path], None]
):
    """And says there what is wrong with it, where something is."""
    tiny.build("llama").save_pretrained(tmp_path)
    change(tmp_path)
    source, asked = load.find_model(ModelConfig(name=str(tmp_path))), []
    real = load.load_model
    monkeypatch.setattr(load, "load_model", lambda source: asked.append(source) or real(source))
    if change is _pickle:
        same(filled(*sharded_load.from_checkpoint(source, backend).take_empty()), real(source))
    else:
        with pytest.raises(load.UserError, match="lacks 1 weights|cannot be loaded"):
            sharded_load.from_checkpoint(source, backend).take_empty()
    assert asked == [source]
