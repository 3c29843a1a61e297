"""Latency as a budget: what a layer costs on this device at a few widths, measured before the weights load.

Seconds depend on shapes, not on values. So models of the same class with a few layers and fresh weights are timed, on one
forward of a fixed batch (for language models the prefill, with its cache and the logits of the last token).
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from tinygn_dist import load
from tinygn_dist.anatomy import Anatomy
from tinygn_dist.backends.base import Backend
from tinygn_dist.budget import Latency, channel_step
from tinygn_dist.config import Config, EvaluateConfig, PruneConfig
from tinygn_dist.objective import Batch, last_logits_only
from tinygn_dist.shrink import smaller_config
from tinygn_dist.units import KeptUnits

log = logging.getLogger(__name__)
_LAYERS = 4
"""of the timed models; with one alone its weights would stay in the processor's cache"""
_RUNS = 7
_SHARES = (0.75, 0.5, 0.25)


class LatencyTarget:
    """table: what layers cost on the main rank's device, the same on every rank. figures: what the report says."""

    def __init__(self, source: load.Source, config: Config, anatomy: Anatomy, backend: Backend) -> None:
        """A collective."""
        self._backend, table, dtype = backend, None, load.dtype_of(source)
        self._batch = inputs_of(source.config, source.task, config.evaluate)
        with backend.together("measuring latency"):
            if backend.is_main:
                table = cost_table(
                    lambda smaller: load.rebuild(source, smaller, dtype),
                    source.config,
                    anatomy,
                    config.prune,
                    self._batch,
                    backend.device,
                )
        self.table: Latency = backend.everyone(table)[0]
        self.figures = {"timed": told(self._batch), "table": asdict(self.table)}

    def time(self, which: str, model: nn.Module) -> None:
        """The latency of a model as the backend placed it. which: dense, then smaller. A collective."""
        bare, device = self._backend.unwrap(model), self._backend.device
        seconds = self._backend.on_main(lambda: forward_seconds(bare, self._batch, device))
        self.figures[f"{which}_seconds"] = self._backend.everyone(seconds)[0]
        if which == "smaller":
            self.figures["ratio"] = self.figures["smaller_seconds"] / self.figures["dense_seconds"]


def inputs_of(config: PretrainedConfig, task: str, options: EvaluateConfig) -> Batch:
    """The batch that is timed: random tokens (batch_size, prefill_tokens), no more than the model has positions for, or
    images of the model's size."""
    generator = torch.Generator().manual_seed(0)
    if task == "image-classification":
        side = getattr(config, "image_size", 224)
        return {"pixel_values": torch.randn(options.batch_size, config.num_channels, side, side, generator=generator)}
    length = min(options.prefill_tokens, (getattr(config, "max_position_embeddings", None) or 1 << 30) - 2)
    return {"input_ids": torch.randint(3, config.vocab_size, (options.batch_size, length), generator=generator)}


def told(batch: Batch) -> str:
    """The shape of what is timed, for people."""
    ((name, tensor),) = batch.items()
    return f"{len(tensor)} x " + (f"{tensor.shape[1]} tokens" if name == "input_ids" else "image")


@torch.no_grad()
def forward_seconds(model: nn.Module, batch: Batch, device: torch.device) -> float:
    """Least time of several forwards: what else runs on a machine only ever adds."""
    run = _forward(model, batch, device)
    return min(_timed(run, device) for _ in range(_RUNS))


def cost_table(
    build: Callable[[PretrainedConfig], nn.Module],
    config: PretrainedConfig,
    anatomy: Anatomy,
    options: PruneConfig,
    batch: Batch,
    device: torch.device,
) -> Latency:
    """Seconds of a layer at a few counts of each kind that may go, and of the rest of the model.

    build: a model of the same class from another config, with any finite weights, on the CPU. options: which kinds may
    go, and the multiple that channels are kept at.
    """
    layers = tuple(range(min(_LAYERS, anatomy.num_layers)))

    def layer_and_rest(**kept: int) -> tuple[float, float]:
        units = {kind: dict.fromkeys(layers, tuple(range(count))) for kind, count in kept.items()}
        model = build(smaller_config(copy.deepcopy(config), anatomy, KeptUnits(layers, **units))).eval().to(device)
        in_layers, whole = _least_in_layers(model, anatomy.layers_path, batch, device)
        return in_layers / len(layers), whole - in_layers

    layer, rest = layer_and_rest()
    table = Latency(anatomy.num_layers, rest, layer)
    for kind in ("heads", "channels"):
        groups = anatomy.of_kind(kind) if kind in options.unit_kinds else ()
        if groups and groups[0].num_units > 1:
            full, multiple = groups[0].num_units, options.multiple_of if kind == "channels" else 1
            seconds = {count: layer_and_rest(**{kind: count})[0] for count in _counts(full, multiple)}
            table = replace(table, **{kind: seconds | {full: layer}})
    log.info("measured %s", table)
    return table


def _counts(full: int, multiple_of: int) -> list[int]:
    """Counts below the full one at which a layer is timed: the least that can stay and some between."""
    step = channel_step(full, multiple_of)
    return sorted(({max(step, round(full * share / step) * step) for share in _SHARES} | {step}) - {full})


def _least_in_layers(model: nn.Module, layers_path: str, batch: Batch, device: torch.device) -> tuple[float, float]:
    """Least seconds from the first layer's start to the last one's end, and of the whole forward."""
    layers, stamps = model.get_submodule(layers_path), [0.0, 0.0]

    def stamp(index: int) -> Callable[..., None]:
        def note(*_: Any) -> None:
            _wait(device)
            stamps[index] = time.perf_counter()

        return note

    handles = [
        layers[0].register_forward_pre_hook(stamp(0)),
        layers[len(layers) - 1].register_forward_hook(stamp(1)),
    ]
    run, inside, whole = _forward(model, batch, device), [], []
    with torch.no_grad():
        for _ in range(_RUNS):
            whole.append(_timed(run, device))
            inside.append(stamps[1] - stamps[0])
    for handle in handles:
        handle.remove()
    return min(inside), min(whole)


def _forward(model: nn.Module, batch: Batch, device: torch.device) -> Callable[[], Any]:
    """One forward, warmed up."""
    asked: Mapping[str, Any] = {name: value.to(device) for name, value in batch.items()} | last_logits_only(model)
    with torch.no_grad():
        model(**asked)
    return lambda: model(**asked)


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
