"""Finite differences of the loss, with forward passes only.

A removal probe shuts some units and measures f(without) - f(with): the finite difference whose step is the whole
unit. A gate derivative moves one gate by +-eps. Losses are kept per sequence in fp64 and differenced on the same
batch; each rank fills in the sequences it saw, so the sum over ranks is exact and independent of their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tinygn_dist.anatomy import Anatomy, UnitGroup
from tinygn_dist.backends.base import Backend
from tinygn_dist.estimate.hooks import InputGate, LayerGate, attached
from tinygn_dist.estimate.restart import PrefixCache, running_layers
from tinygn_dist.objective import Batch, Objective
from tinygn_dist.progress import Progress


@dataclass(frozen=True)
class Probe:
    """Gates of some units of one layer set to `factor`. group None: the layer itself."""

    layer: int
    group: UnitGroup | None = None
    units: tuple[int, ...] = ()
    factor: float = 0.0


@dataclass
class Measured:
    """What probes saw. differences: (probes, sequences) fp64, change of each sequence's summed loss; counts:
    (sequences,) fp64 tokens; base: (sequences,) fp64 summed losses with every gate at 1; forwards: probe passes."""

    probes: Sequence[Probe]
    differences: torch.Tensor
    counts: torch.Tensor
    base: torch.Tensor
    forwards: int = field(default=0)


def measure(
    model: nn.Module,
    anatomy: Anatomy,
    objective: Objective,
    batches: Sequence[Batch],
    probes: Sequence[Probe],
    backend: Backend,
    progress: Progress,
    *,
    without: Sequence[int] = (),
) -> Measured:
    """Loss change of every probe on every sequence. `without`: layers that are already gone.

    Batches are shared over the ranks; each probe restarts from the cached input of its layer.
    """
    spans = _spans(batches)
    num_sequences = spans[-1].stop if spans else 0
    differences = torch.zeros(len(probes), num_sequences, dtype=torch.float64)
    base, counts = torch.zeros(2, num_sequences, dtype=torch.float64)
    layers = [layer for layer in range(anatomy.num_layers) if layer not in without]
    bare = backend.unwrap(model)
    mine = backend.share(list(zip(batches, spans, strict=True)))
    with torch.no_grad(), progress.bar("probing", len(mine) * len(probes)) as advance:
        for (batch, span), real in mine:
            batch = {name: value.to(backend.device) for name, value in batch.items()}
            cache = PrefixCache()
            with running_layers(bare, anatomy, layers), cache.recording(bare, anatomy, layers):
                plain = objective(model, batch)
            if real:
                base[span], counts[span] = plain.total.cpu(), plain.count.double().cpu()
            for index, probe in enumerate(probes):
                total = _probed(model, bare, anatomy, objective, batch, layers, cache, probe)
                if real:
                    differences[index, span] = (total - plain.total).cpu()
                advance()
    backend.sum_over_data([differences, base, counts])
    return Measured(probes, differences, counts, base, len(probes) * len(batches))


def gate_derivatives(
    model: nn.Module,
    anatomy: Anatomy,
    objective: Objective,
    batches: Sequence[Batch],
    gates: Sequence[Probe],
    backend: Backend,
    progress: Progress,
    step: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Central differences (f(1 + step) - f(1 - step)) / 2 step of each gate (the probes' own factors are ignored).

    Returns (gates, sequences) fp64 derivatives of each sequence's summed loss, and (sequences,) token counts.
    """
    moved = [Probe(g.layer, g.group, g.units, 1 + sign * step) for g in gates for sign in (1, -1)]
    seen = measure(model, anatomy, objective, batches, moved, backend, progress)
    return (seen.differences[0::2] - seen.differences[1::2]) / (2 * step), seen.counts


def default_step(dtype: torch.dtype) -> float:
    """Step for a gate near 1 in a central difference, from the dtype's resolution: (3 u)^(1/3) balances rounding
    noise u against the third derivative when both are of the loss's own size (Berahas et al. 2019)."""
    return (3 * torch.finfo(dtype).eps) ** (1 / 3)


def _probed(model, bare, anatomy, objective, batch, layers, cache, probe) -> torch.Tensor:
    later = [layer for layer in layers if layer > probe.layer]
    if probe.group is None and probe.factor == 0:
        with running_layers(bare, anatomy, later, (cache, probe.layer)):
            return objective(model, batch).total
    with (
        running_layers(bare, anatomy, [probe.layer, *later], (cache, probe.layer)),
        attached([gate_hook(bare, anatomy, probe, backend_device=next(iter(batch.values())).device)]),
    ):
        return objective(model, batch).total


def gate_hook(bare: nn.Module, anatomy: Anatomy, probe: Probe, backend_device: torch.device):
    """(module, hook) that sets the probe's gates."""
    if probe.group is None:
        layer = bare.get_submodule(f"{anatomy.layers_path}.{probe.layer}")
        return layer, LayerGate(torch.tensor(probe.factor, device=backend_device))
    factors = torch.ones(probe.group.num_units, device=backend_device)
    factors[list(probe.units)] = probe.factor
    return bare.get_submodule(probe.group.output), InputGate(factors, probe.group.output_width)


def single_units(groups: Sequence[UnitGroup]) -> Iterator[Probe]:
    """One removal probe per unit."""
    for group in groups:
        for unit in range(group.num_units):
            yield Probe(group.layer, group, (unit,))


def _spans(batches: Sequence[Batch]) -> list[slice]:
    spans, start = [], 0
    for batch in batches:
        size = len(next(iter(batch.values())))
        spans.append(slice(start, start + size))
        start += size
    return spans
