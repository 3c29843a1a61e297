"""The model under its wrappers, by the names of its checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from tests import tiny
from tinygn_dist.backends.pieces import tensors_of
from tinygn_dist.backends.wrappers import refuse_spread, running_plainly, without


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Adapted(nn.Module):
    """As PEFT's tuner layers are made, with an adapter whose own parts have adapters' names."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(32, 2)})

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


def test_wrappers_come_off_in_any_order():
    model = nn.Linear(2, 2)
    for wrapped in (
        model,
        torch.compile(model),
        Wrapped(torch.compile(model)),
        torch.compile(Wrapped(model)),
        torch.compile(Wrapped(torch.compile(model))),
    ):
        assert without(wrapped, Wrapped, DistributedDataParallel) is model


def test_names_are_those_of_the_checkpoint_and_find_what_they_name():
    model, wanted = tiny.build("llama-tied"), list(tensors_of(tiny.build("llama-tied")))
    layers = model.model.layers
    attention, mlp = layers[0].self_attn, layers[1].mlp
    attention.q_proj, mlp.down_proj = Adapted(attention.q_proj), torch.compile(Adapted(mlp.down_proj))
    layers[0], layers[2] = torch.compile(layers[0]), torch.compile(checkpoint_wrapper(layers[2]))
    found = tensors_of(model)
    assert list(found) == wanted
    for name, tensor in found.items():
        assert model.get_parameter(name) is tensor


def test_between_steps_nothing_is_computed_twice_or_compiled():
    """Hooks that add up statistics would count a recomputed forward again."""
    calls, compiled = [], []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    layer = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    layer[0].register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(torch.compile(checkpoint_wrapper(layer), backend=backend))
    with running_plainly(model):
        model(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert len(calls) == 1 and not compiled
    again = nn.Sequential(checkpoint_wrapper(layer))
    again(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert len(calls) == 3  # it was only left out in between


def test_a_whole_model_is_not_refused():
    assert refuse_spread(tiny.build("llama")) is None
    with pytest.raises(Exception, match="device_map"):
        refuse_spread(tiny.build("llama").to("meta"))
