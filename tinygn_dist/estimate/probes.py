"""Finite differences of the loss, with forward passes only.

A removal probe shuts some units and measures f(without) - f(with): the finite difference whose step is the whole
unit. A gate may also be moved a little (gates.py makes derivatives of that). Losses are kept per sequence in fp64 and
differenced on the same batch; each rank fills in its own sequences, so the sum over ranks is exact and independent of
their number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate.hooks import ModelHook
from torch import nn

from tinygn_dist.estimate.hooks import LayerGate, attached, routed_to, unit_gates
from tinygn_dist.estimate.partial_forward import PrefixCache, running_layers
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.anatomy import UnitGroup
from tinygn_dist.models.objective import Batch


@dataclass(frozen=True)
class Probe:
    """Gates of some units of one layer set to `factor`. group None: the gate of the layer itself.

    Factor 0 is removal: experts are then taken from the router, which shares their tokens out among the others.
    """

    layer: int
    group: UnitGroup | None = None
    units: tuple[int, ...] = ()
    factor: float = 0.0

    @property
    def removes_layer(self) -> bool:
        return self.group is None and self.factor == 0


@dataclass(frozen=True)
class Measured:
    """The losses that probes measured.

    differences: (probes, sequences) fp64, change of each sequence's summed loss. counts: (sequences,) fp64 tokens.
    base: (sequences,) fp64 summed losses with every gate at 1. forwards: probe passes over all ranks.
    """

    differences: torch.Tensor
    counts: torch.Tensor
    base: torch.Tensor
    forwards: int


def measure(
    problem: Problem, probes: Sequence[Probe], *, without: Sequence[Probe] = (), reuse: bool = True
) -> Measured:
    """Loss change of every probe on every sequence. `without`: layers and units that are already gone.

    Batches, and where they do not go round probes, are shared over the ranks; each probe restarts from the cached input
    of its layer, or without `reuse`, or where a forward cannot start there, runs the layers before it too.
    """
    reuse = reuse and problem.anatomy.starts_anywhere
    differences = torch.zeros(len(probes), problem.num_sequences, dtype=torch.float64)
    base, counts = torch.zeros(2, problem.num_sequences, dtype=torch.float64)
    out = {probe.layer for probe in without if probe.removes_layer}
    gone = [probe for probe in without if not probe.removes_layer]
    layers = [layer for layer in range(problem.anatomy.num_layers) if layer not in out]
    mine = problem.backend.dealt(_dealt(problem, probes))
    with torch.no_grad(), problem.progress.bar("probing", sum(len(work.probes) for work, _ in mine)) as advance:
        for work, counted in mine:
            micro_batch = problem.micro_batch(work.batch, counted)
            batch, span = micro_batch.batch, micro_batch.sequences
            cache = PrefixCache() if reuse else None
            with (
                _gated(problem, gone),
                cache.recording(problem.bare, problem.anatomy, layers) if cache else contextlib.nullcontext(),
                running_layers(problem.bare, problem.anatomy, layers),
            ):
                plain = problem.losses(batch)
            if counted and work.first:
                base[span], counts[span] = plain.total.cpu(), plain.count.double().cpu()
            for index in work.probes:
                total = _probed(problem, batch, layers, cache, [probes[index], *gone])
                if counted:
                    differences[index, span] = (total - plain.total).cpu()
                advance()
    problem.backend.sum_over_data([differences, base, counts])
    return Measured(differences, counts, base, len(probes) * len(problem.batches))


@dataclass(frozen=True)
class _Work:
    """What one rank does with one micro-batch. probes: indices of those that it measures. first: of the ranks that have
    this micro-batch, it is the one that adds the plain losses."""

    batch: int
    probes: list[int]
    first: bool


def _dealt(problem: Problem, probes: Sequence[Probe]) -> list[_Work]:
    """Work in the order in which it is dealt out to the ranks one by one.

    Whole micro-batches as long as they go round, because a rank that takes part in one runs its plain forward; then
    each of the rest cut into parts that cost the same. A probe costs the layers from its own on, so those of a
    micro-batch are sorted by layer and dealt back and forth (0 1 1 0 0 1 ...). Ranks that share one copy of the model
    take part in the same forwards: there nothing is cut.
    """
    ranks, batches = problem.backend.num_ranks, len(problem.batches)
    in_order = sorted(range(len(probes)), key=lambda index: probes[index].layer)
    rest = batches % ranks
    parts = ranks // math.gcd(ranks, rest) if rest else 1
    if problem.backend.shards_weights or len(in_order) < 2 * parts:
        parts, rest = 1, 0
    turns = [in_order[part :: 2 * parts] + in_order[2 * parts - 1 - part :: 2 * parts] for part in range(parts)]
    whole = [_Work(batch, in_order, True) for batch in range(batches - rest)]
    return whole + [
        _Work(batch, turns[part], part == 0) for batch in range(batches - rest, batches) for part in range(parts)
    ]


def single_units(groups: Sequence[UnitGroup]) -> Iterator[Probe]:
    """One removal probe per unit."""
    for group in groups:
        for unit in range(group.num_units):
            yield Probe(group.layer, group, (unit,))


def _probed(
    problem: Problem, batch: Batch, layers: Sequence[int], cache: PrefixCache | None, probes: Sequence[Probe]
) -> torch.Tensor:
    """(batch,) fp64 summed losses with the gates of all these probes set, from one forward. The first probe is the one
    that is measured: the forward starts at its layer where there is a cache."""
    first = probes[0].layer
    out = {probe.layer for probe in probes if probe.removes_layer}
    left = [layer for layer in layers if layer not in out and (layer >= first or not cache)]
    gated = _gated(problem, [probe for probe in probes if not probe.removes_layer])
    with gated, running_layers(problem.bare, problem.anatomy, left, (cache, first) if cache else None):
        return problem.losses(batch).total


@contextlib.contextmanager
def _gated(problem: Problem, probes: Sequence[Probe]) -> Iterator[None]:
    """The gates of all these probes."""
    device, bare = problem.backend.device, problem.bare
    hooks: list[tuple[nn.Module, ModelHook]] = []
    factors: dict[UnitGroup, torch.Tensor] = {}
    kept: dict[UnitGroup, set[int]] = {}
    for probe in probes:
        group = probe.group
        if group is None:
            factor = torch.tensor(probe.factor, dtype=torch.float64, device=device)
            hooks.append((bare.get_submodule(problem.anatomy.path_of(probe.layer)), LayerGate(factor)))
        elif group.router and probe.factor == 0:
            kept.setdefault(group, set(range(group.num_units))).difference_update(probe.units)
        else:
            ones = torch.ones(group.num_units, dtype=torch.float64, device=device)
            factors.setdefault(group, ones)[list(probe.units)] = probe.factor
    for group, gates in factors.items():
        hooks += unit_gates(bare, group, gates)
    with attached(hooks), routed_to(bare, {group: sorted(units) for group, units in kept.items()}):
        yield
