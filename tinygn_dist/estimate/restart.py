"""Forward passes that leave layers out, or start in the middle from a cached input.

Layers before a probed one do not change, so a probe of layer l needs only layers l.. of the model. The model's own
forward does the work (masks, rotary embeddings, final norm, head): for the length of one call its list of layers is
replaced by the wanted ones, with a stand-in that hands over the cached hidden states in front.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tinygn_dist.anatomy import Anatomy
from tinygn_dist.estimate.hooks import Observer, attached, with_first


class _Handover(nn.Module):
    """Stands where the skipped layers were and returns the cached input of the first layer that runs."""

    def __init__(self, hidden: torch.Tensor, shape_of: Any, like: nn.Module) -> None:
        super().__init__()
        self._output = with_first(shape_of, hidden)
        self._like = (like,)  # in a tuple, so that the layer is not registered twice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_like"][0], name)  # such as a layer's attention_type


class PrefixCache:
    """The input of every layer for one micro-batch, recorded during a plain forward."""

    def __init__(self) -> None:
        self.inputs: dict[int, torch.Tensor] = {}
        self.output_like: Any = None

    @contextlib.contextmanager
    def recording(self, model: nn.Module, anatomy: Anatomy, layers: Sequence[int]) -> Iterator[None]:
        def observer(layer: int) -> Observer:
            def seen(hidden: torch.Tensor, output: Any) -> None:
                self.inputs[layer], self.output_like = hidden.detach(), output

            return Observer(seen, output=True)

        modules = model.get_submodule(anatomy.layers_path)
        with attached([(modules[layer], observer(layer)) for layer in layers]):
            yield


@contextlib.contextmanager
def running_layers(
    model: nn.Module, anatomy: Anatomy, layers: Sequence[int], start: tuple[PrefixCache, int] | None = None
) -> Iterator[None]:
    """Inside the context the model's forward runs only `layers`, in order; with start=(cache, l), from layer l's
    cached input. Everything is put back afterwards."""
    if not anatomy.layers_path:  # a convolutional net always runs whole
        yield
        return
    parent_path, _, name = anatomy.layers_path.rpartition(".")
    parent, config = model.get_submodule(parent_path), model.base_model.config
    everything = getattr(parent, name)
    wanted, types = [everything[layer] for layer in layers], list(layers)
    if start is not None:
        cache, layer = start
        wanted.insert(0, _Handover(cache.inputs[layer], cache.output_like, everything[layer]))
        types.insert(0, layer)
    changed = (anatomy.family.depth, "layer_types", "use_cache")
    saved = {key: getattr(config, key) for key in changed if hasattr(config, key)}
    try:
        parent._modules[name] = nn.ModuleList(wanted)
        setattr(config, anatomy.family.depth, len(wanted))
        config.use_cache = False  # layers look for their entry by their own number
        if saved.get("layer_types"):
            config.layer_types = [saved["layer_types"][layer] for layer in types]
        yield
    finally:
        parent._modules[name] = everything
        if "use_cache" not in saved:
            del config.use_cache
        for key, value in saved.items():
            setattr(config, key, value)
