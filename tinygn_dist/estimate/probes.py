"""Finite differences of the loss, with forward passes only.

A removal probe shuts some units and measures f(without) - f(with): the finite difference whose step is the whole
unit. A gate may also be moved a little (gates.py makes derivatives of that). Losses are kept per sequence in fp64 and differenced on the same
batch; each rank fills in the sequences it saw, so the sum over ranks is exact and independent of their number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate.hooks import ModelHook
from torch import nn

from tinygn_dist.estimate.hooks import LayerGate, attached, routed_to, unit_gates
from tinygn_dist.estimate.partial_forward import PrefixCache, running_layers
from tinygn_dist.estimate.problem import Problem, batch_size
from tinygn_dist.models.anatomy import UnitGroup
from tinygn_dist.models.objective import Batch


@dataclass(frozen=True)
class Probe:
    """Gates of some units of one layer set to `factor`. group None: the gate of the layer itself. also: what else is changed at
    the same time, in this layer or later ones (see `together`).

    Factor 0 is removal: experts are then taken from the router, which shares their tokens out among the others.
    """

    layer: int
    group: UnitGroup | None = None
    units: tuple[int, ...] = ()
    factor: float = 0.0
    also: tuple[Probe, ...] = ()

    @property
    def removes_layer(self) -> bool:
        return self.group is None and self.factor == 0

    @property
    def may_share(self) -> bool:
        """Whether other settings of the same gates fit into its forward: each sequence then has factors of its own."""
        return not self.also and not self.removes_layer and not (self.group and self.group.router and self.factor == 0)


def together(probes: Iterable[Probe]) -> Probe:
    """One probe of all these changes at once."""
    first, *others = sorted(probes, key=lambda probe: probe.layer)
    return replace(first, also=tuple(others))


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


def measure(
    problem: Problem, probes: Sequence[Probe], *, without: Sequence[Probe] = (), reuse: bool = True
) -> Measured:
    """Loss change of every probe on every sequence. `without`: layers and units that are already gone.

    Batches, and where they do not go round probes, are shared over the ranks; each probe restarts from the cached input of its
    layer, or without `reuse`, or where a forward cannot start there, runs the layers before it too.
    """
    reuse = reuse and problem.anatomy.starts_anywhere
    differences = torch.zeros(len(probes), problem.num_sequences, dtype=torch.float64)
    base, counts = torch.zeros(2, problem.num_sequences, dtype=torch.float64)
    out = {probe.layer for probe in without if probe.removes_layer}
    gone = [probe for probe in without if not probe.removes_layer]
    layers = [layer for layer in range(problem.anatomy.num_layers) if layer not in out]
    mine = problem.backend.dealt(_dealt(problem, probes))
    with torch.no_grad(), problem.progress.bar("probing", sum(len(work.shared) for work, _ in mine)) as advance:
        for work, counted in mine:
            micro_batch = problem.micro_batch(work.batch, counted)
            batch, span = micro_batch.batch, micro_batch.sequences
            cache = PrefixCache(problem.costs.cache_bytes, problem.costs.cache_bytes) if reuse else None
            with (
                _gated(problem, [[probe] for probe in gone], batch_size(batch)),
                cache.recording(problem.bare, problem.anatomy, layers) if cache else contextlib.nullcontext(),
                running_layers(problem.bare, problem.anatomy, layers),
            ):
                plain = problem.losses(batch)
            if counted and work.first:
                base[span], counts[span] = plain.total.cpu(), plain.count.double().cpu()
            for indices in work.shared:
                total = _probed(problem, batch, layers, cache, [probes[index] for index in indices], gone)
                if counted:
                    differences[indices, span] = (total - plain.total).cpu()
                advance()
    problem.backend.sum_over_data([differences, base, counts])
    return Measured(differences, counts, base, len(probes) * len(problem.batches))


@dataclass(frozen=True)
class _Work:
    """What one rank does with one micro-batch. shared: indices of the probes of each forward. first: of the ranks that have
    this micro-batch, it is the one that tells the plain losses."""

    batch: int
    shared: list[list[int]]
    first: bool


def _dealt(problem: Problem, probes: Sequence[Probe]) -> list[_Work]:
    """Work in the order in which it is dealt out to the ranks one by one.

    Whole micro-batches as long as they go round, because a rank that takes part in one runs its plain forward; then each of the
    rest cut into parts that cost the same. A probe costs the layers from its own on, so those of a micro-batch are sorted by
    layer and dealt back and forth (0 1 1 0 0 1 ...). Ranks that share one copy of the model take part in the same forwards:
    there nothing is cut.
    """
    ranks, batches = problem.backend.num_ranks, len(problem.batches)
    shared = sorted(_chunks(probes, problem.costs.together), key=lambda indices: probes[indices[0]].layer)
    rest = batches % ranks
    parts = ranks // math.gcd(ranks, rest) if rest else 1
    if problem.backend.shards_weights or len(shared) < 2 * parts:
        parts, rest = 1, 0
    turns = [shared[part :: 2 * parts] + shared[2 * parts - 1 - part :: 2 * parts] for part in range(parts)]
    whole = [_Work(batch, shared, True) for batch in range(batches - rest)]
    return whole + [
        _Work(batch, turns[part], part == 0) for batch in range(batches - rest, batches) for part in range(parts)
    ]


def single_units(groups: Sequence[UnitGroup]) -> Iterator[Probe]:
    """One removal probe per unit."""
    for group in groups:
        for unit in range(group.num_units):
            yield Probe(group.layer, group, (unit,))


def _chunks(probes: Sequence[Probe], most: int) -> Iterator[list[int]]:
    """Indices of neighbouring probes that go into one forward."""
    chunk: list[int] = []
    for index, probe in enumerate(probes):
        before = probes[chunk[-1]] if chunk else None
        fits = before and before.may_share and probe.may_share
        if chunk and not (fits and len(chunk) < most and (before.layer, before.group) == (probe.layer, probe.group)):
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


def _probed(
    problem: Problem,
    batch: Batch,
    layers: Sequence[int],
    cache: PrefixCache | None,
    probes: Sequence[Probe],
    gone: Sequence[Probe],
) -> torch.Tensor:
    """(probes, batch) fp64 summed losses with each probe's gates set, from one forward. Several are of one place."""
    times, first = len(probes), probes[0].layer
    parts = [probes, *([part] for part in (*probes[0].also, *gone))]
    out = {part[0].layer for part in parts if part[0].removes_layer}
    left = [layer for layer in layers if layer not in out and (layer >= first or not cache)]
    if times > 1:
        batch = {name: value.repeat(times, *[1] * (value.dim() - 1)) for name, value in batch.items()}
    start = (cache, first) if cache else None
    gated = [part for part in parts if not part[0].removes_layer]
    with (
        _gated(problem, gated, batch_size(batch) // times),
        running_layers(problem.bare, problem.anatomy, left, start, times),
    ):
        return problem.losses(batch).total.view(times, -1)


@contextlib.contextmanager
def _gated(problem: Problem, parts: Sequence[Sequence[Probe]], size: int) -> Iterator[None]:
    """Every part's gates; a part of several probes of one place sets them for `size` sequences each, and is the first."""
    device, bare = problem.backend.device, problem.bare
    hooks: list[tuple[nn.Module, ModelHook]] = []
    factors: dict[UnitGroup, torch.Tensor] = {}
    kept: dict[UnitGroup, set[int]] = {}
    for part in parts:
        group, each = part[0].group, torch.tensor([p.factor for p in part], dtype=torch.float64, device=device)
        if group is None:
            layer = bare.get_submodule(problem.anatomy.path_of(part[0].layer))
            hooks.append((layer, LayerGate(each[0] if len(part) == 1 else each.repeat_interleave(size))))
        elif group.router and part[0].factor == 0:
            kept.setdefault(group, set(range(group.num_units))).difference_update(part[0].units)
        else:
            ones = torch.ones(len(part), group.num_units, dtype=torch.float64, device=device)
            gates = factors.setdefault(group, ones)
            for row, probe in zip(gates, part if len(part) == len(gates) else part * len(gates), strict=True):
                row[list(probe.units)] = probe.factor
    for group, gates in factors.items():
        hooks += unit_gates(bare, group, gates[0] if len(gates) == 1 else gates.repeat_interleave(size, 0))
    with attached(hooks), routed_to(bare, {group: sorted(units) for group, units in kept.items()}):
        yield
