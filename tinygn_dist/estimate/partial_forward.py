"""Forward passes that leave layers out, or start in the middle from a cached input.

Layers before a probed one do not change, so a probe of layer l needs only layers l.. of the model. The model's own
forward does the work (masks, rotary embeddings, final norm, head): for the length of one call its list of layers is
replaced by the wanted ones, with a stand-in that hands over the cached hidden states in front.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tinygn_dist.estimate.hooks import Observer, attached, first
from tinygn_dist.models.anatomy import Anatomy
from tinygn_dist.models.stacks import Stack


class _Handover(nn.Module):
    """Stands where the skipped layers were and returns the cached input of the first layer that runs."""

    def __init__(self, hidden: torch.Tensor, rest: tuple | None, like: nn.Module) -> None:
        super().__init__()
        self._output = hidden if rest is None else (hidden, *rest)
        self._like = (like,)  # in a tuple, so that the layer is not registered twice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_like"][0], name)  # such as a layer's attention_type


class PrefixCache:
    """The input of every layer for one micro-batch, recorded during a plain forward.

    device_room, cpu_room: bytes of inputs kept where the layers run and in CPU memory (which is where the layers run on a CPU);
    the rest waits in files without a name (in TMPDIR) that are gone with the cache.
    """

    def __init__(self, device_room: float = float("inf"), cpu_room: float = float("inf")) -> None:
        self.inputs: dict[int, torch.Tensor] = {}
        self.output_rest: tuple | None = None
        """what layers return behind their hidden states; None where they return those alone"""
        self._rest_of: dict[int, tuple | None] = {}  # the same, by the first layer of each of several stacks
        self._rooms = {"device": device_room, "cpu": cpu_room}
        self._device: torch.device | None = None

    def keep(self, layer: int, hidden: torch.Tensor, output: Any) -> None:
        """The input of a layer, and what some layer returned."""
        self._device, self.output_rest = hidden.device, output[1:] if isinstance(output, tuple) else None
        size = hidden.numel() * hidden.element_size()
        places = ["cpu"] if hidden.device.type == "cpu" else ["device", "cpu"]
        place = next((place for place in places if self._rooms[place] >= size), None)
        if place is None:
            self.inputs[layer] = _in_a_file(hidden)
        else:
            self._rooms[place] -= size
            self.inputs[layer] = hidden if place == "device" else hidden.cpu()

    def at(self, layer: int, times: int = 1) -> torch.Tensor:
        """A layer's input where it was recorded, its sequences `times` times one after the other."""
        hidden = self.inputs[layer].to(self._device)
        return hidden if times == 1 else hidden.repeat(times, *[1] * (hidden.dim() - 1))

    @contextlib.contextmanager
    def recording(self, model: nn.Module, anatomy: Anatomy, layers: Sequence[int]) -> Iterator[None]:
        def observer(layer: int, stack: Stack, ends: bool) -> Observer:
            def seen(hidden: torch.Tensor, output: Any) -> None:
                self.keep(layer, hidden.detach(), output)
                self._rest_of[stack.first] = self.output_rest
                if ends:
                    self.keep(_end_of(stack), first(output).detach(), output)

            return Observer(seen, output=True)

        watched = []
        for stack in anatomy.stacks:
            own = stack.kept(layers)
            for layer in own:
                ends = layer == own[-1] and stack is not anatomy.stacks[-1]
                watched.append((model.get_submodule(anatomy.path_of(layer)), observer(layer, stack, ends)))
        with attached(watched):
            yield

    def stand_in(self, stack: Stack, layer: int, times: int, like: nn.Module) -> _Handover:
        """For the layers of a stack that come before `layer`: all of them where that is in a later stack."""
        rest = self._rest_of.get(stack.first, self.output_rest)
        return _Handover(self.at(layer if layer in stack.layers else _end_of(stack), times), rest, like)


def _end_of(stack: Stack) -> int:
    """Where a cache holds what a stack hands on; no layer has this number."""
    return ~stack.first


def _in_a_file(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose memory is a mapped file: the system writes it out, and takes the pages back when it needs room."""
    with tempfile.NamedTemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, tensor.numel() * tensor.element_size())  # a full disk says so here
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.view(tensor.shape).copy_(tensor)


@contextlib.contextmanager
def running_layers(
    model: nn.Module,
    anatomy: Anatomy,
    layers: Sequence[int],
    start: tuple[PrefixCache, int] | None = None,
    times: int = 1,
) -> Iterator[None]:
    """Inside the context the model's forward runs only `layers`, in order; with start=(cache, l), from layer l's
    cached input, of which a micro-batch is given `times` times. Everything is put back afterwards."""
    config = model.base_model.config
    entries = {stack.depth if isinstance(stack.depth, str) else stack.depth[0] for stack in anatomy.stacks}
    saved = {key: getattr(config, key) for key in (*entries, "layer_types", "use_cache") if hasattr(config, key)}
    lists = {stack.path: model.get_submodule(stack.path) for stack in anatomy.stacks}  # none in a convolutional net
    try:
        for stack in anatomy.stacks:
            own, everything = stack.kept(layers), lists[stack.path]
            wanted, types = [everything[layer - stack.first] for layer in own], list(own)
            if start is not None and start[1] >= stack.first:
                cache, layer = start
                like = everything[min(layer - stack.first, stack.num - 1)]
                wanted.insert(0, cache.stand_in(stack, layer, times, like))
                types.insert(0, layer)
            _put(model, stack.path, nn.ModuleList(wanted))
            stack.set_depth(config, len(wanted))
            if saved.get("layer_types"):
                config.layer_types = [saved["layer_types"][layer] for layer in types]
        if anatomy.stacks:
            config.use_cache = False  # layers look for their entry by their own number
        yield
    finally:
        for path, everything in lists.items():
            _put(model, path, everything)
        if anatomy.stacks and "use_cache" not in saved:
            del config.use_cache
        for key, value in saved.items():
            setattr(config, key, value)


def _put(model: nn.Module, path: str, layers: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = layers
