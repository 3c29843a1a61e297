"""The same statistics by backpropagation, where memory allows. Each micro-batch is one sample of the gradient."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tinygn_dist.estimate.hooks import LayerGate, attached, unit_gates
from tinygn_dist.estimate.problem import Problem, batch_size
from tinygn_dist.maths.sums import Moments
from tinygn_dist.models.anatomy import Matrix, UnitGroup


@contextlib.contextmanager
def gradients_of(model: nn.Module, wanted: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only `wanted` receive gradients inside; flags and gradients are as before afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    chosen = {id(p) for p in wanted}
    try:
        for p, _, _ in before:
            p.requires_grad_(id(p) in chosen)
            p.grad = None
        yield
    finally:
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad


@contextlib.contextmanager
def recomputed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A backward inside runs each module's forward once more and keeps of it only what it read until then (Chen et al.
    2016, arXiv 1604.06174). Hooks within a module see its forward twice, and a gradient once."""
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for module in modules:
            before.append((module, {"forward": module.__dict__["forward"]} if "forward" in module.__dict__ else {}))
            module.forward = functools.partial(
                checkpoint,
                module.forward,
                use_reentrant=False,
                preserve_rng_state=module.training,
                early_stop=False,  # hooks that fetch weights also give them back, behind the forward
            )
        yield
    finally:
        for module, state in reversed(before):
            del module.forward
            module.__dict__.update(state)


def weight_gradients(problem: Problem, matrices: Sequence[Matrix], *, squares: bool) -> Moments:
    """Per matrix name, the sum over micro-batches of g (or of g^2 with `squares`), g the gradient of the micro-batch's
    mean loss per token; shaped like this rank's shard. Summed over the data of all ranks."""
    parameters = [problem.bare.get_parameter(name) for name in dict.fromkeys(t.parameter for t in matrices)]
    function = torch.square if squares else _itself
    with (
        gradients_of(problem.bare, parameters),
        problem.backend.gradient_sums(problem.model, matrices, function) as sums,
    ):
        for micro_batch in problem.micro_batches("gradients"):
            with sums.micro_batch(counts=micro_batch.counts):
                problem.losses(micro_batch.batch).mean().backward()
    return sums.moments


def _itself(grad: torch.Tensor) -> torch.Tensor:
    return grad


def gate_gradients(
    problem: Problem, groups: Sequence[UnitGroup], layers: Sequence[int]
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Exact derivative of each sequence's summed loss by every gate, at all gates 1.

    One gate per sequence and unit, so one backward gives every derivative of a micro-batch. Returns per group
    (units, sequences) fp64, for the layers (layers, sequences), and (sequences,) token counts.
    """
    backend, num_sequences = problem.backend, problem.num_sequences
    results = [torch.zeros(group.num_units, num_sequences, dtype=torch.float64) for group in groups]
    by_layer = torch.zeros(len(layers), num_sequences, dtype=torch.float64)
    counts = torch.zeros(num_sequences, dtype=torch.float64)
    layer_modules = [problem.bare.get_submodule(problem.anatomy.path_of(layer)) for layer in layers]
    with gradients_of(problem.bare, ()):
        for micro_batch in problem.micro_batches("gate gradients"):
            size = batch_size(micro_batch.batch)
            gates = [torch.ones(size, g.num_units, device=backend.device, requires_grad=True) for g in groups]
            layer_gates = [torch.ones(size, device=backend.device, requires_grad=True) for _ in layers]
            hooks = [
                hook
                for group, gate in zip(groups, gates, strict=True)
                for hook in unit_gates(problem.bare, group, gate)
            ]
            hooks += [(m, LayerGate(gate)) for m, gate in zip(layer_modules, layer_gates, strict=True)]
            with attached(hooks):
                losses = problem.losses(micro_batch.batch)
                losses.total.sum().backward()
            if micro_batch.counts:
                span = micro_batch.sequences
                counts[span] = losses.count.double().cpu()
                for result, gate in zip(results, gates, strict=True):
                    result[:, span] = gate.grad.double().t().cpu()
                for row, gate in zip(by_layer, layer_gates, strict=True):
                    row[span] = gate.grad.double().cpu()
    backend.sum_over_data([*results, by_layer, counts])
    return results, by_layer, counts
