"""Finite differences of the loss, with forward passes only.

A removal probe shuts some units and measures f(without) - f(with): the finite difference whose step is the whole
unit. A gate may also be moved a little (gates.py makes derivatives of that). Losses are kept per sequence in fp64 and differenced on the same
batch; each rank fills in the sequences it saw, so the sum over ranks is exact and independent of their number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tinygn_dist.anatomy import UnitGroup
from tinygn_dist.estimate.hooks import LayerGate, attached, routed_to, unit_gates
from tinygn_dist.estimate.restart import PrefixCache, running_layers
from tinygn_dist.estimate.setting import Setting, batch_size
from tinygn_dist.objective import Batch


@dataclass(frozen=True)
class Probe:
    """Gates of some units of one layer set to `factor`. group None: the gate of the layer itself.

    Factor 0 is removal: experts are then taken from the router, which shares their tokens out among the others.
    """

    layer: int
    group: UnitGroup | None = None
    units: tuple[int, ...] = ()
    factor: float = 0.0


@dataclass(frozen=True)
class Measured:
    """What probes saw.

    differences: (probes, sequences) fp64, change of each sequence's summed loss. counts: (sequences,) fp64 tokens.
    base: (sequences,) fp64 summed losses with every gate at 1. forwards: probe passes over all ranks.
    """

    differences: torch.Tensor
    counts: torch.Tensor
    base: torch.Tensor
    forwards: int


def measure(setting: Setting, probes: Sequence[Probe], *, without: Sequence[int] = (), reuse: bool = True) -> Measured:
    """Loss change of every probe on every sequence. `without`: layers that are already gone.

    Batches, and where they do not go round probes, are shared over the ranks; each probe restarts from the cached input of its
    layer, or without `reuse` runs the layers before it too.
    """
    sizes = [batch_size(batch) for batch in setting.batches]
    differences = torch.zeros(len(probes), sum(sizes), dtype=torch.float64)
    base, counts = torch.zeros(2, sum(sizes), dtype=torch.float64)
    layers = [layer for layer in range(setting.anatomy.num_layers) if layer not in without]
    parts = _num_parts(setting, len(probes))
    work = [(batch, sum(sizes[:i]), part) for i, batch in enumerate(setting.batches) for part in range(parts)]
    mine = setting.backend.share(work)
    with torch.no_grad(), setting.progress.bar("probing", len(mine) * len(probes) // parts) as advance:
        for (batch, start, part), real in mine:
            batch = setting.on_device(batch)
            cache = PrefixCache() if reuse else None
            with (
                cache.recording(setting.bare, setting.anatomy, layers) if cache else contextlib.nullcontext(),
                running_layers(setting.bare, setting.anatomy, layers),
            ):
                plain = setting.objective(setting.model, batch)
            span = slice(start, start + len(plain.total))
            if real and part == 0:
                base[span], counts[span] = plain.total.cpu(), plain.count.double().cpu()
            for index in range(part, len(probes), parts):
                total = _probed(setting, batch, layers, cache, probes[index])
                if real:
                    differences[index, span] = (total - plain.total).cpu()
                advance()
    setting.backend.sum_over_data([differences, base, counts])
    return Measured(differences, counts, base, len(probes) * len(setting.batches))


def _num_parts(setting: Setting, num_probes: int) -> int:
    """Into how many parts the probes of a micro-batch are cut so that no rank waits for another: every part costs a plain
    forward of its own. One where ranks share a copy of the model, because they take part in the same forwards."""
    ranks = setting.backend.num_ranks
    parts = ranks // math.gcd(ranks, max(1, len(setting.batches)))
    return parts if not setting.backend.shards_weights and num_probes >= 2 * parts else 1


def single_units(groups: Sequence[UnitGroup]) -> Iterator[Probe]:
    """One removal probe per unit."""
    for group in groups:
        for unit in range(group.num_units):
            yield Probe(group.layer, group, (unit,))


def _probed(
    setting: Setting, batch: Batch, layers: Sequence[int], cache: PrefixCache | None, probe: Probe
) -> torch.Tensor:
    """(batch,) fp64 summed losses with the probe's gates set."""
    start = (cache, probe.layer) if cache else None
    left = [layer for layer in layers if layer >= probe.layer or not cache]
    if probe.group is None and probe.factor == 0:
        left.remove(probe.layer)
        gated = contextlib.nullcontext()
    else:
        gated = _gated(setting, probe)
    with gated, running_layers(setting.bare, setting.anatomy, left, start):
        return setting.objective(setting.model, batch).total


def _gated(setting: Setting, probe: Probe) -> contextlib.AbstractContextManager[None]:
    device = setting.backend.device
    if probe.group is None:
        layer = setting.bare.get_submodule(f"{setting.anatomy.layers_path}.{probe.layer}")
        return attached([(layer, LayerGate(torch.tensor(probe.factor, dtype=torch.float64, device=device)))])
    if probe.group.router and probe.factor == 0:
        return routed_to(setting.bare, {probe.group: sorted(set(range(probe.group.num_units)) - set(probe.units))})
    factors = torch.ones(probe.group.num_units, dtype=torch.float64, device=device)
    factors[list(probe.units)] = probe.factor
    return attached(unit_gates(setting.bare, probe.group, factors))
