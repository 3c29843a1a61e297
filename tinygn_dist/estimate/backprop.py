"""The same statistics by backpropagation, where memory allows. Each micro-batch is one sample of the gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from tinygn_dist.anatomy import Anatomy, Target, UnitGroup
from tinygn_dist.backends.base import Backend
from tinygn_dist.estimate.hooks import InputGate, LayerGate, attached
from tinygn_dist.moments import Moments
from tinygn_dist.objective import Batch, Objective
from tinygn_dist.progress import Progress


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


def weight_gradients(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    backend: Backend,
    progress: Progress,
    *,
    squares: bool,
) -> Moments:
    """Per target name, the sum over micro-batches of g (or of g^2 with `squares`), g the gradient of the micro-batch's
    mean loss per token; shaped like this rank's shard. Summed over the data of all ranks."""
    bare, moments = backend.unwrap(model), Moments()
    parameters = [bare.get_parameter(target.name) for target in targets]
    mine = backend.share(batches)
    for target in targets:
        moments.reserve(target.name, tuple(backend.shard(model, target).weight.shape), backend.device)
    with gradients_of(bare, parameters), progress.bar("gradients", len(mine)) as advance:
        for batch, real in mine:
            batch = {name: value.to(backend.device) for name, value in batch.items()}
            objective(model, batch).mean().backward()
            for target, parameter in zip(targets, parameters, strict=True):
                grad = backend.shard(model, target).grad
                if real and grad is not None:
                    moments.add(target.name, grad.float().square() if squares else grad.float())
                parameter.grad = None
            advance()
    backend.sum_over_data(moments.tensors())
    return moments


def gate_gradients(
    model: nn.Module,
    anatomy: Anatomy,
    objective: Objective,
    batches: Sequence[Batch],
    groups: Sequence[UnitGroup],
    layers: Sequence[int],
    backend: Backend,
    progress: Progress,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Exact derivative of each sequence's summed loss by every gate, at all gates 1.

    One gate per sequence and unit, so one backward gives every derivative of a micro-batch. Returns per group
    (units, sequences) fp64, for the layers (layers, sequences), and (sequences,) token counts.
    """
    bare = backend.unwrap(model)
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    results = [torch.zeros(group.num_units, sum(sizes), dtype=torch.float64) for group in groups]
    by_layer = torch.zeros(len(layers), sum(sizes), dtype=torch.float64)
    counts = torch.zeros(sum(sizes), dtype=torch.float64)
    mine = backend.share(list(zip(batches, starts, sizes, strict=True)))
    with gradients_of(bare, ()), progress.bar("gate gradients", len(mine)) as advance:
        for (batch, start, size), real in mine:
            batch = {name: value.to(backend.device) for name, value in batch.items()}
            gates = [torch.ones(size, g.num_units, device=backend.device, requires_grad=True) for g in groups]
            layer_gates = [torch.ones(size, device=backend.device, requires_grad=True) for _ in layers]
            hooks = [
                (bare.get_submodule(g.output), InputGate(gate, g.output_width))
                for g, gate in zip(groups, gates, strict=True)
            ]
            hooks += [
                (bare.get_submodule(f"{anatomy.layers_path}.{layer}"), LayerGate(gate))
                for layer, gate in zip(layers, layer_gates, strict=True)
            ]
            with attached(hooks):
                losses = objective(model, batch)
                losses.total.sum().backward()
            if real:
                span = slice(start, start + size)
                counts[span] = losses.count.double().cpu()
                for result, gate in zip(results, gates, strict=True):
                    result[:, span] = gate.grad.double().t().cpu()
                for row, gate in zip(by_layer, layer_gates, strict=True):
                    row[span] = gate.grad.double().cpu()
            advance()
    backend.sum_over_data([*results, by_layer, counts])
    return results, by_layer, counts
