"""Forward passes that leave layers out, or start in the middle from a cached input.

Layers before a probed one do not change, so a probe of layer l needs only layers l.. of the model. The model's own
forward does the work (masks, rotary embeddings, final norm, head): for the length of one call its list of layers is
replaced by the wanted ones, with a stand-in that hands over the cached hidden states in front.

`run_layers` runs a model a few layers at a time, each rank keeping the hidden states of its own micro-batches in CPU
memory in between: so the layers before, which may have changed since, do not run again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import nn

from tinygn_dist.estimate.hooks import Observer, attached, first
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.anatomy import Anatomy
from tinygn_dist.models.objective import Batch, last_logits_only, model_inputs
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

    on_cpu: whether inputs wait in CPU memory, instead of where the layers run.
    """

    def __init__(self, *, on_cpu: bool = False) -> None:
        self.inputs: dict[int, torch.Tensor] = {}
        self.output_rest: tuple | None = None
        """what layers return behind their hidden states; None where they return those alone"""
        self._rest_of: dict[int, tuple | None] = {}  # the same, by the first layer of each of several stacks
        self._on_cpu = on_cpu
        self._device: torch.device | None = None

    def keep(self, layer: int, hidden: torch.Tensor, output: Any) -> None:
        """The input of a layer, and what some layer returned."""
        self._device, self.output_rest = hidden.device, output[1:] if isinstance(output, tuple) else None
        self.inputs[layer] = hidden.cpu() if self._on_cpu else hidden

    def at(self, layer: int) -> torch.Tensor:
        """A layer's input, on the device where it was recorded."""
        return self.inputs[layer].to(self._device)

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

    def stand_in(self, stack: Stack, layer: int, like: nn.Module) -> _Handover:
        """For the layers of a stack that come before `layer`: all of them where that is in a later stack."""
        rest = self._rest_of.get(stack.first, self.output_rest)
        return _Handover(self.at(layer if layer in stack.layers else _end_of(stack)), rest, like)


def _end_of(stack: Stack) -> int:
    """Where a cache holds what a stack hands on; no layer has this number."""
    return ~stack.first


@contextlib.contextmanager
def running_layers(
    model: nn.Module,
    anatomy: Anatomy,
    layers: Sequence[int],
    start: tuple[PrefixCache, int] | None = None,
) -> Iterator[None]:
    """Inside the context the model's forward runs only `layers`, in order; with start=(cache, l), from layer l's
    cached input. Everything is put back afterwards."""
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
                wanted.insert(0, cache.stand_in(stack, layer, like))
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


def run_layers(
    problem: Problem,
    layers: range,
    starts: Sequence[PrefixCache],
    hooks: Iterable[tuple[nn.Module, ModelHook]] = (),
    seen: Callable[[int, Batch], None] = lambda number, batch: None,
) -> list[PrefixCache]:
    """A forward of each of this rank's micro-batches through `layers` alone; returns what the layer after the last one
    reads.

    starts: what this returned for the layers before; empty: `layers` begin at the embeddings. seen(which of this
    rank's, micro-batch on the device): called after each forward that counts.
    """
    ends: list[PrefixCache] = []

    def run(batch: Batch) -> Any:
        return output_of(problem, layers, batch, starts[len(ends)] if starts else None)

    for micro_batch, output in problem.forwards(run, hooks, f"layers {layers[0]} to {layers[-1]}"):
        end = PrefixCache(on_cpu=True)
        end.keep(layers.stop, first(output), output)
        if micro_batch.counts:
            seen(len(ends), micro_batch.batch)
        ends.append(end)
    return ends


def output_of(problem: Problem, layers: range, batch: Batch, start: PrefixCache | None) -> Any:
    """What the last of `layers` returns for a micro-batch on the device. start: what they read; None: the
    embeddings."""
    last, outputs = problem.bare.get_submodule(problem.anatomy.layers_path)[layers[-1]], []
    recording = attached([(last, Observer(lambda _, output: outputs.append(output), output=True))])
    at = None if start is None else (start, layers[0])
    with running_layers(problem.bare, problem.anatomy, layers, at), recording:
        problem.model(**model_inputs(batch), **last_logits_only(problem.bare))
    return outputs[0]
