"""Layers run a few at a time: what a layer reads is kept from one call to the next, so the layers before it, which may have
changed since, do not run again.

Each rank keeps the hidden states of its own micro-batches, at one place in the model, on the CPU (in files beyond
`ProbeCosts.cache_bytes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import nn

from tinygn_dist.estimate.hooks import Observer, attached, first
from tinygn_dist.estimate.partial_forward import PrefixCache, running_layers
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.objective import Batch, last_logits_only, model_inputs


def run_layers(
    problem: Problem,
    layers: range,
    starts: Sequence[PrefixCache],
    hooks: Iterable[tuple[nn.Module, ModelHook]] = (),
    seen: Callable[[int, Batch], None] = lambda number, batch: None,
) -> list[PrefixCache]:
    """A forward of each of this rank's micro-batches through `layers` alone; returns what the layer after the last one reads.

    starts: what this returned for the layers before; empty: `layers` begin at the embeddings. seen(which of this rank's,
    micro-batch on the device): called after each forward that counts.
    """
    mine, ends = problem.backend.share(problem.batches), []
    room = problem.costs.cache_bytes / len(mine) if mine else 0
    doing = f"layers {layers[0]} to {layers[-1]}"
    with torch.no_grad(), attached(hooks), problem.progress.bar(doing, len(mine)) as advance:
        for number, (batch, real) in enumerate(mine):
            batch, end = problem.on_device(batch), PrefixCache(0, room)
            output = output_of(problem, layers, batch, starts[number] if starts else None)
            end.keep(layers.stop, first(output), output)
            if real:
                seen(number, batch)
            ends.append(end)
            advance()
    return ends


def output_of(problem: Problem, layers: range, batch: Batch, start: PrefixCache | None) -> Any:
    """What the last of `layers` returns for a micro-batch on the device. start: what they read; None: the embeddings."""
    last, outputs = problem.bare.get_submodule(problem.anatomy.layers_path)[layers[-1]], []
    recording = attached([(last, Observer(lambda _, output: outputs.append(output), output=True))])
    at = None if start is None else (start, layers[0])
    with running_layers(problem.bare, problem.anatomy, layers, at), recording:
        problem.model(**model_inputs(batch), **last_logits_only(problem.bare))
    return outputs[0]
