"""Every export is what the plain class asks for: names, shapes, code and config, whatever was put around the model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from tests import tiny
from tests.family_cases import build
from tests.pipeline.test_end_to_end import stored
from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints.companions import Companions, companions_of
from tinygn_dist.checkpoints.export import write_checkpoint
from tinygn_dist.checkpoints.formats.form import Form
from tinygn_dist.errors import Refused

CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from .own_parts import FACTOR

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("table", torch.arange(64.0) * FACTOR, persistent=False)

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.table[1]
        return out
"""
AUTO_MAP = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}


def wrapped(model: nn.Module, **asked: object) -> nn.Module:
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, **asked))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    return made


def rows(model: nn.Module) -> nn.Module:
    return wrapped(model, target_modules=["q_proj"], trainable_token_indices=[1, 5])


def whole(model: nn.Module) -> nn.Module:
    return wrapped(model, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])


def norms(model: nn.Module) -> nn.Module:
    return wrapped(model, target_modules=["down_proj"], modules_to_save=["input_layernorm"])


def parameters(model: nn.Module) -> nn.Module:
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return wrapped(model, target_modules=["q_proj"], target_parameters=names)


def rows_compiled(model: nn.Module) -> nn.Module:
    return torch.compile(rows(model), backend="eager")


def layers_compiled(model: nn.Module) -> nn.Module:
    model = wrapped(model, target_modules=["q_proj", "down_proj"])
    layers = model.get_base_model().model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    return model


@pytest.mark.parametrize(
    "family, wrap",
    [
        ("llama", rows),
        ("llama", whole),
        ("llama", norms),
        ("llama", rows_compiled),
        ("llama", layers_compiled),
        ("llama-tied", rows),
        ("qwen3_moe", parameters),
        ("mixtral", parameters),
    ],
)
def test_files_are_those_of_the_model_under_its_adapters(
    backend: Backend, tmp_path: Path, family: str, wrap: Callable[[nn.Module], nn.Module]
):
    """Trained copies, token rows and low-rank pairs belong to the adapter, whose own save keeps them."""
    model = tiny.build(family) if family in tiny.CONFIGS else build(family)
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", wrap(model), Form(), Companions(), 1.0, backend)
    wanted, found = stored(tmp_path / "plain"), stored(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    torch._dynamo.reset()


def extra_parameter(model: nn.Module) -> None:
    model.model.layers[1].mlp.gate = nn.Parameter(torch.zeros(3))


def extra_buffer(model: nn.Module) -> None:
    model.register_buffer("seen_tokens", torch.zeros(1))


def no_norm(model: nn.Module) -> None:
    model.model.norm = nn.Identity()


def longer_embedding(model: nn.Module) -> None:
    model.model.embed_tokens.weight = nn.Parameter(torch.zeros(140, 32))


def config_of_another_size(model: nn.Module) -> None:
    model.config.intermediate_size = 40


@pytest.mark.parametrize(
    "change, part",
    [
        (extra_parameter, "no place for 1 tensors of the model, such as model.layers.1.mlp.gate"),
        (extra_buffer, "no place for 1 tensors of the model, such as seen_tokens"),
        (no_norm, "lacks 1 tensors that LlamaForCausalLM loads, such as model.norm.weight"),
        (longer_embedding, r"embed_tokens.weight has shape \(140, 32\), LlamaForCausalLM asks for \(128, 32\)"),
        (config_of_another_size, r"has shape \(48, 32\), LlamaForCausalLM asks for \(40, 32\) by its config"),
    ],
)
def test_what_a_stock_load_would_drop_or_miss_is_refused_by_name(
    backend: Backend, tmp_path: Path, change: Callable[[nn.Module], None], part: str
):
    model = tiny.build("llama")
    change(model)
    with pytest.raises(Refused, match=part):
        write_checkpoint(tmp_path, model, Form(), Companions(), 1.0, backend)


@pytest.fixture
def own_code(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "own"
    tiny.build("llama").save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text())
    facts |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "own_model.py").write_text(CODE)
    (folder / "own_parts.py").write_text("FACTOR = 0.5\n")
    yield folder
    for name in [name for name in sys.modules if "own_model" in name or "own_parts" in name]:
        del sys.modules[name]


def swapped(model: nn.Module) -> nn.Module:
    """As FSDP2 does it."""
    from torch.distributed.fsdp import FSDPModule

    kind = type(f"FSDP{type(model).__name__}", (FSDPModule, type(model)), {"__module__": "torch.distributed.fsdp"})
    model.__class__ = kind
    return model


def adapters(model: nn.Module) -> nn.Module:
    return wrapped(model, target_modules=["q_proj"])


@pytest.mark.parametrize("wrap", [lambda model: model, swapped, adapters, torch.compile])
@pytest.mark.parametrize("with_source", [True, False])
def test_custom_code_comes_along_whatever_the_live_class_is(
    backend: Backend, own_code: Path, tmp_path: Path, wrap: Callable, with_source: bool
):
    model = AutoModelForCausalLM.from_pretrained(own_code, trust_remote_code=True).eval()
    with torch.no_grad():
        expected = model(torch.arange(3, 9)[None]).logits
    out = tmp_path / "out"
    out.mkdir()
    beside = companions_of(str(own_code)) if with_source else Companions()
    write_checkpoint(out, wrap(model), Form(), beside, 1.0, backend)
    facts = json.loads((out / "config.json").read_text())
    assert facts["architectures"] == ["OwnForCausalLM"]
    assert facts["auto_map"] == AUTO_MAP
    for name in ("own_model.py", "own_parts.py"):
        assert (out / name).read_bytes() == (own_code / name).read_bytes()
    assert sorted(f.name for f in out.glob("*.py")) == ["own_model.py", "own_parts.py"]
    elsewhere = out.rename(tmp_path / "elsewhere")
    again = AutoModelForCausalLM.from_pretrained(elsewhere, trust_remote_code=True).eval()
    for name, tensor in model.state_dict().items():
        if name in again.state_dict():
            assert torch.equal(again.state_dict()[name], tensor), name
    again.table.copy_(torch.arange(64.0) * 0.5)
    with torch.no_grad():
        found = again(torch.arange(3, 9)[None]).logits
    assert expected.shape == found.shape


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classifier"])
def test_the_class_under_a_swap_is_the_one_in_the_config(backend: Backend, tmp_path: Path, family: str):
    model = tiny.build(family)
    plain = type(model).__name__
    write_checkpoint(tmp_path, swapped(model), Form(), Companions(), 1.0, backend)
    assert AutoConfig.from_pretrained(tmp_path).architectures == [plain]


def test_a_subclass_of_the_users_own_script_is_named(backend: Backend, tmp_path: Path):
    class Mine(LlamaForCausalLM):
        pass

    model = Mine(tiny.build("llama").config)
    write_checkpoint(tmp_path, model, Form(), Companions(), 1.0, backend)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Mine"]
