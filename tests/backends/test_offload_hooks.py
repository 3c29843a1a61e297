"""Weights that wait off the device: one block at a time has them, and gradients are those of the plain model."""

from __future__ import annotations

import copy
import errno
import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import tiny
from tinygn_dist.backends import make_backend
from tinygn_dist.backends.offload_hooks import offload, offloaded_parameters
from tinygn_dist.backends.pieces import Origin, hollow
from tinygn_dist.config import DistributedConfig
from tinygn_dist.errors import UserError

CPU = torch.device("cpu")


class Shared(nn.Module):
    """One matrix that two modules read, a module inside another that has weights of its own, and one that runs
    twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.rand(4) + 0.5), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(torch.tanh(self.one(self.inner(self.inner(x * self.scale)) + x)) * self.scale)


def offloaded(model: nn.Module, folder: Path | None = None, device_bytes: float = 0) -> nn.Module:
    offload(model, CPU, folder, device_bytes)
    return model


def present(model: nn.Module) -> set[str]:
    """Parameters that have their values now."""
    return {name for name, parameter in model.named_parameters() if not parameter.detach().isnan().any()}


@pytest.mark.parametrize("on_disk", [False, True])
def test_between_uses_no_weight_is_there_and_outputs_are_the_same(tmp_path: Path, on_disk: bool):
    model, batch = tiny.build("llama-tied"), tiny.batches("llama")[0]
    with torch.no_grad():
        wanted = model(input_ids=batch["input_ids"]).logits
        offloaded(model, tmp_path if on_disk else None)
        assert present(model) == set()
        assert torch.equal(model(input_ids=batch["input_ids"]).logits, wanted)
        assert present(model) == set() and not list(tmp_path.iterdir())


def test_one_layer_at_a_time_is_there_forward_and_backward():
    model = offloaded(tiny.build("llama"))
    seen: list[tuple[str, set[str]]] = []

    def watch(module: nn.Module, _: tuple, output: torch.Tensor) -> None:
        seen.append(("forward", present(model)))
        output.register_hook(lambda _: seen.append(("backward", present(model))))

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(watch)
    model(input_ids=tiny.batches("llama")[0]["input_ids"]).logits.sum().backward()
    layers = [{n for n, _ in model.named_parameters() if f"layers.{i}." in n} for i in (0, 1, 2)]
    assert [what for _, what in seen] == [*layers, *reversed(layers)]
    assert [when for when, _ in seen] == ["forward"] * 3 + ["backward"] * 3
    assert present(model) == set()  # the first layer, too, whose input needs a gradient, and the embeddings


def test_the_first_layers_stay_as_far_as_there_is_room():
    model = tiny.build("llama")
    first, layer = model.model.embed_tokens.weight.numel(), sum(p.numel() for p in model.model.layers[0].parameters())
    offloaded(model, None, 4 * (first + 2 * layer) + 3)
    stay = {n for n, _ in model.named_parameters() if "embed" in n or "layers.0." in n or "layers.1." in n}
    assert present(model) == stay


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_plain_model(checkpointing: bool):
    plain, batch = tiny.build("llama-tied").train(), tiny.batches("llama")[0]
    model = copy.deepcopy(plain)
    offloaded(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    for one in (plain, model):
        if checkpointing:
            one.gradient_checkpointing_enable({"use_reentrant": False})
        one(input_ids=batch["input_ids"]).logits.square().mean().backward()
        one(input_ids=batch["input_ids"][:1]).logits.square().mean().backward()  # added to the first
    for wanted, found in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad)
    assert present(model) == set() and flags == [parameter.requires_grad for parameter in model.parameters()]


def test_gradients_of_shared_nested_and_repeated_modules():
    torch.manual_seed(0)
    plain = Shared()
    model, x = offloaded(copy.deepcopy(plain)), torch.randn(3, 4, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    plain(x).square().sum().backward()
    model(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    for wanted, found in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)
    assert present(model) == set()


def test_an_edit_reaches_the_next_forward_and_the_cast_keeps_values(tmp_path: Path):
    model = offloaded(nn.Sequential(nn.Linear(3, 2, bias=False)), tmp_path)
    (home,) = offloaded_parameters(model).values()
    home.value.data.fill_(2.0)
    assert torch.equal(model(torch.ones(1, 3)), torch.full((1, 2), 6.0))
    home.cast(torch.bfloat16)
    assert model(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(home.value.data, torch.full((2, 3), 2.0, dtype=torch.bfloat16))


def test_a_model_that_nobody_uses_is_freed():
    model = offloaded(tiny.build("llama"))
    model(input_ids=tiny.batches("llama")[0]["input_ids"]).logits.sum().backward()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("error", [errno.ENOENT, errno.ENOSPC])
def test_a_folder_without_room_is_told_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: int
):
    def full(*_: int) -> None:
        raise OSError(error, os.strerror(error))

    folder = tmp_path / "missing" if error == errno.ENOENT else tmp_path
    monkeypatch.setattr(os, "posix_fallocate", full)
    backend = make_backend(DistributedConfig(offload="disk", offload_dir=str(folder)))
    empty = hollow(lambda: tiny.build("llama"))
    with pytest.raises(UserError) as told:
        backend.place(
            Origin(lambda: pytest.fail("read whole"), lambda: (empty, lambda *_: pytest.fail("weights were read")))
        )
    needed = sum(parameter.numel() for parameter in empty.parameters()) * 4
    assert f"{folder}: {os.strerror(error)}" in str(told.value) and f"{needed:,} bytes" in str(told.value)
