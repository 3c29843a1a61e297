"""Layers run a few at a time: what a layer reads is kept from one call to the next, so the layers before it, which may have
changed since, do not run again.

Each rank keeps the hidden states of its own micro-batches, at one place in the model, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import nn

from tinygn_dist.estimate.hooks import Observer, attached, first
from tinygn_dist.estimate.restart import PrefixCache, running_layers
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.objective import Batch, last_logits_only, model_inputs


def run_layers(
    setting: Setting,
    layers: range,
    starts: Sequence[PrefixCache],
    hooks: Iterable[tuple[nn.Module, ModelHook]] = (),
    seen: Callable[[int, Batch], None] = lambda number, batch: None,
) -> list[PrefixCache]:
    """A forward of each of this rank's micro-batches through `layers` alone; returns what the layer after the last one reads.

    starts: what this returned for the layers before; empty: `layers` begin at the embeddings. seen(which of this rank's,
    micro-batch on the device): called after each forward that counts.
    """
    mine, ends = setting.backend.share(setting.batches), []
    last = setting.bare.get_submodule(setting.anatomy.layers_path)[layers[-1]]
    doing = f"layers {layers[0]} to {layers[-1]}"
    with torch.no_grad(), attached(hooks), setting.progress.bar(doing, len(mine)) as advance:
        for number, (batch, real) in enumerate(mine):
            batch, end = setting.on_device(batch), PrefixCache(device_room=0)
            start = (starts[number], layers[0]) if starts else None
            recording = attached([(last, Observer(_into(end, layers.stop), output=True))])
            with running_layers(setting.bare, setting.anatomy, layers, start), recording:
                setting.model(**model_inputs(batch), **last_logits_only(setting.bare))
            if real:
                seen(number, batch)
            ends.append(end)
            advance()
    return ends


def _into(end: PrefixCache, layer: int) -> Callable[[torch.Tensor, Any], None]:
    def seen(_: torch.Tensor, output: Any) -> None:
        end.keep(layer, first(output), output)

    return seen
