"""Layers run a few at a time: what a layer reads is kept from one call to the next, so the layers before it, which may
have changed since, do not run again.

Each rank keeps the hidden states of its own micro-batches, at one place in the model, on the CPU (in files beyond
`ProbeCosts.cache_bytes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

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
    """A forward of each of this rank's micro-batches through `layers` alone; returns what the layer after the last one
    reads.

    starts: what this returned for the layers before; empty: `layers` begin at the embeddings. seen(which of this
    rank's, micro-batch on the device): called after each forward that counts.
    """
    ends: list[PrefixCache] = []
    room = problem.costs.cache_bytes / max(1, problem.num_turns)

    def run(batch: Batch) -> Any:
        return output_of(problem, layers, batch, starts[len(ends)] if starts else None)

    for micro_batch, output in problem.forwards(run, hooks, f"layers {layers[0]} to {layers[-1]}"):
        end = PrefixCache(0, room)
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
