"""Scores of layers and units from what the loss does when they go.

Single removals misjudge sets: two units that stand in for each other both look free. So layers are taken out one by one and
the best candidates probed again without those that are gone, or judged by something better (`depth`); of other units the same may be asked (`prune.probe_greedy`), or
pairs (`prune.probe_pairs`), or random subsets (`prune.probe_subsets`). All of it is within one budget.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.elimination import Contest, Limit, Standing, late, successive_elimination
from tinygn_dist.estimate.input_moments import InputMoments
from tinygn_dist.estimate.probes import Probe
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.estimate.unit_statistics import column_energies, unit_magnitude
from tinygn_dist.experiments.unit_subsets import Effects, effects_together, interactions, pairs_of
from tinygn_dist.models.anatomy import UnitGroup

log = logging.getLogger(__name__)
REPROBED = 4
"""candidates probed again after each removed one: removing one changes what the others are worth"""
JUDGED = 2 * REPROBED
"""layers that a judge looks at before one is gone"""
MANY = 64
"""units per group above which single probes are too many, and the report lists none"""


@dataclass
class UnitScores:
    """by_group: (kind, layer) -> (units,) scores; a missing group is chosen by its solver. layer_order: layers, the
    first to go first. table: what the report shows. pairs: the same of pairs. forwards: probe passes spent; exhaustive: what
    removal probes would have taken on every sequence; open: groups whose choice noise or the budget left open. steps: of gate
    derivatives, by kind and layer, with what was measured to choose them. kinked: gates at which the loss has no
    derivative."""

    by_group: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    layer_order: list[int] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    forwards: int = 0
    exhaustive: int = 0
    open: int = 0
    started: float = field(default_factory=time.monotonic)
    steps: list[dict[str, Any]] = field(default_factory=list)
    kinked: int = 0


class Removals:
    """The probes of one choice, within what the budget has left."""

    def __init__(self, scores: UnitScores, problem: Problem, options: PruneConfig) -> None:
        self.scores, self.problem, self.options = scores, problem, options

    @property
    def limit(self) -> Limit:
        forwards, minutes = self.options.probe_forwards, self.options.probe_minutes
        return Limit(
            float("inf") if forwards is None else forwards - self.scores.forwards,
            float("inf") if minutes is None else self.scores.started + 60 * minutes,
        )

    @property
    def spent(self) -> bool:
        """Whether the budget is. The same on every rank."""
        return self.limit.forwards <= 0 or late(self.problem, self.limit)

    def spend(self, forwards: int, exhaustive: int | None = None) -> None:
        """Forwards of what is no probe, which the budget counts. exhaustive: more, where something cut them short."""
        self.scores.forwards += forwards
        self.scores.exhaustive += forwards if exhaustive is None else exhaustive

    def affordable(self) -> float:
        """Probes on all micro-batches that the budget of forwards has left."""
        return self.limit.forwards / len(self.problem.batches)

    def successive_elimination(
        self, asked: Sequence[Probe], contests: Sequence[Contest], without: Sequence[Probe] = ()
    ) -> Standing:
        adaptive = self.options.probe_adaptive and bool(contests)
        found = successive_elimination(
            self.problem, asked, contests, adaptive=adaptive, without=without, limit=self.limit
        )
        self.scores.forwards += found.forwards
        self.scores.exhaustive += found.exhaustive
        self.scores.open += found.open
        return found

    def count(self, effects: Effects) -> Effects:
        self.spend(effects.forwards)
        return effects

    def greedy(self, probes: Sequence[Probe], contests: Sequence[Contest], found: Standing) -> list[int]:
        """Indices of what goes, in order, each after the best few have been measured again without those before it. What the
        budget does not measure again goes by what is known of it."""

        def again(best: list[int], gone: list[int]) -> dict[int, float]:
            if self.spent:
                return {}
            without, asked = [probes[i] for i in gone], [probes[i] for i in best[:REPROBED]]
            seen = self.successive_elimination(asked, [Contest(tuple(range(len(asked))), 1)], without)
            self.tell(asked, seen.mean, seen.error, without)
            return dict(zip(best, seen.mean.tolist(), strict=False))

        return take_out(contests, found, again)

    def tell(
        self, asked: Sequence[Probe], mean: torch.Tensor, error: torch.Tensor, without: Sequence[Probe] | None = None
    ) -> None:
        """Lists losses in the report. without: what was gone when they were measured; None where nothing ever is."""
        for probe, loss, deviation in zip(asked, mean.tolist(), error.tolist(), strict=True):
            kind = probe.group.kind if probe.group else "layers"
            row = row_of(kind, probe.layer, "removal", loss, deviation)
            if probe.group:
                row |= {"unit": probe.units[0], "units": len(probe.units)}
            self.scores.table.append(row if without is None else row | {"without": [_name(gone) for gone in without]})


def take_out(
    contests: Sequence[Contest],
    found: Standing,
    again: Callable[[list[int], list[int]], Mapping[int, float]],
    *,
    at_once: bool = False,
) -> list[int]:
    """Indices of what goes, in order: of all whose contest has room the one with the least loss, one after the other.

    again: given those that may go, best first, and those that are gone, new losses of some. at_once: also asked when none is gone,
    and one of those goes.
    """
    known: dict[int, float] = {}
    for contest in contests:  # what few sequences decided stands, whatever the means became on more
        in_order = sorted(contest.probes, key=lambda i: int(found.place[i]))
        known |= zip(in_order, itertools.accumulate((float(found.mean[i]) for i in in_order), max), strict=True)
    room, gone = [contest.removed for contest in contests], []
    number = {index: number for number, contest in enumerate(contests) for index in contest.probes}
    while True:
        able = [i for i in known if room[number[i]] > 0 and i not in gone]
        if able and (gone or at_once):
            able.sort(key=lambda i: (known[i], int(found.place[i]), i))
            told = again(able, gone)
            known |= told
            if told and at_once:  # what others were known to cost is not comparable
                able = list(told)
        if not able:
            return gone
        gone.append(min(able, key=lambda i: (known[i], int(found.place[i]), i)))
        room[number[gone[-1]]] -= 1


Judge = Callable[[Removals, list[int], list[int]], Mapping[int, float]]
"""(the probes, layers that may go with the best first, those that are gone) -> new losses of some of them"""


def order_layers(
    scores: UnitScores,
    problem: Problem,
    layers: Sequence[int],
    removed: int,
    options: PruneConfig,
    judge: Judge | None = None,
) -> None:
    """layer_order, of `removed` of these layers: probe all once, then greedily. judge: says better than probes what the best of
    them cost."""
    removals, probes = Removals(scores, problem, options), [Probe(layer) for layer in layers]
    everyone = tuple(range(len(layers)))
    goes, asked = Contest(everyone, removed), [1, 1 + REPROBED] if judge is None else [JUDGED]
    found = removals.successive_elimination(
        probes, [Contest(everyone, count) for count in asked]
    )  # which go, or are looked at again
    removals.tell(probes, found.mean, found.error, [])

    def judged(able: list[int], gone: list[int]) -> dict[int, float]:
        told = judge(removals, [layers[i] for i in able], [layers[i] for i in gone])
        return {layers.index(layer): loss for layer, loss in told.items()}

    order = removals.greedy(probes, [goes], found) if judge is None else take_out([goes], found, judged, at_once=True)
    scores.layer_order = [layers[i] for i in order]


def unit_losses(
    scores: UnitScores,
    problem: Problem,
    groups: Sequence[UnitGroup],
    options: PruneConfig,
    moments: InputMoments | None,
    removed: int,
) -> list[torch.Tensor]:
    """(units,) fp64 scores of each group, of one probe per block of units. Those of filters are losses, and compete everywhere;
    others say in what order units go."""
    of_filters, blocks = groups[0].kind == "filters", _blocks(problem, groups, options, moments)
    probes = [
        Probe(group.layer, group, tuple(block.tolist()))
        for group, parts in zip(groups, blocks, strict=True)
        for block in parts
    ]
    starts = list(itertools.accumulate((len(parts) for parts in blocks), initial=0))
    contests = [
        Contest(tuple(range(start, start + len(parts))), min(math.ceil(removed / len(parts[0])), len(parts)))
        for start, parts in zip(starts, blocks, strict=False)
    ]
    several = options.pattern == "units" and options.counts is None  # mixes of kinds remove fewer, too
    asked = [replace(c, removed=k) for c in contests for k in range(1 if several else c.removed, c.removed + 1)]
    removals = Removals(scores, problem, options)
    found = removals.successive_elimination(probes, [] if of_filters else asked)
    mean, error, values = found.mean, found.error, found.place.double()
    if of_filters:
        values = mean
    elif options.probe_subsets:
        together = _by_subsets(removals, probes, contests, mean)
        mean, error, values = (together.mean, together.error, together.mean) if together else (mean, error, values)
    removals.tell(probes, mean, error)
    if options.probe_greedy and not of_filters:
        values = _places(removals.greedy(probes, contests, found), found)
    if options.probe_pairs and not of_filters:
        values = _places(_by_pairs(removals, probes, contests, found), found)
    spread = _share_among_units if of_filters else _spread_over_units
    return [
        spread(values[start : start + len(parts)], parts, group.num_units)
        for start, parts, group in zip(starts, blocks, groups, strict=False)
    ]


def _blocks(
    problem: Problem, groups: Sequence[UnitGroup], options: PruneConfig, moments: InputMoments | None
) -> list[list[torch.Tensor]]:
    """The units of each probe. One head or expert; channels in blocks of similar activation energy, which orders them inside; of
    filters at most MANY blocks of similar magnitude per group, whose units share the block's loss."""
    if groups[0].kind == "filters":
        orders = [unit_magnitude(problem, group).argsort(stable=True) for group in groups]
        return [list(order.split(max(1, len(order) // MANY))) for order in orders]
    if groups[0].num_units <= MANY or groups[0].router:
        return [list(torch.arange(group.num_units).split(1)) for group in groups]
    energies = column_energies(problem, groups, moments)
    return [list(energy.argsort(stable=True).cpu().split(options.probe_channels)) for energy in energies]


def _by_subsets(
    removals: Removals, probes: Sequence[Probe], contests: Sequence[Contest], alone: torch.Tensor
) -> Effects | None:
    """The units' parts in the losses of random subsets, as many as the budget leaves; None where it leaves none."""
    options = removals.options
    count = int(min(options.probe_subsets, removals.affordable()))
    if count < 2 or removals.spent:
        log.warning("the budget of probes left nothing for prune.probe_subsets")
        return None
    return removals.count(effects_together(removals.problem, probes, contests, alone, count, seed=options.seed))


def _by_pairs(removals: Removals, probes: Sequence[Probe], contests: Sequence[Contest], found: Standing) -> list[int]:
    """Indices of what goes, in order, by single losses and what pairs cost beyond them (as far as that is not noise)."""
    pairs = pairs_of(contests, found.mean, removals.options.probe_pairs)
    while pairs and len(pairs) + len({i for pair in pairs for i in pair}) > removals.affordable():
        pairs.pop()
    if not pairs or removals.spent:
        log.warning("the budget of probes left nothing for prune.probe_pairs")
        return take_out(contests, found, lambda able, gone: {})
    seen = removals.count(interactions(removals.problem, [(probes[i], probes[j]) for i, j in pairs]))
    beyond: dict[tuple[int, int], float] = {}
    for (i, j), extra, error in zip(pairs, seen.mean.tolist(), seen.error.tolist(), strict=True):
        names = [_name(probes[i]), _name(probes[j])]
        removals.scores.pairs.append({"units": names, "beyond": extra, "std_error": error})
        sure = max(0.0, 1 - (error / extra) ** 2) if extra else 0.0
        beyond[i, j] = beyond[j, i] = sure * extra

    def again(able: list[int], gone: list[int]) -> dict[int, float]:
        return {i: float(found.mean[i]) + sum(beyond.get((i, j), 0.0) for j in gone) for i in able}

    return take_out(contests, found, again)


def _places(gone: Sequence[int], found: Standing) -> torch.Tensor:
    """(probes,) in what order units go: those that are gone, then the others by their places."""
    places = len(found.place) + found.place.double()
    places[list(gone)] = torch.arange(len(gone), dtype=torch.float64)
    return places


def _name(probe: Probe) -> int | list[int]:
    """A layer; a unit as [layer, unit]."""
    return [probe.layer, probe.units[0]] if probe.group else probe.layer


def row_of(kind: str, layer: int, criterion: str, value: float, error: float | None = None) -> dict[str, Any]:
    row = {"kind": kind, "layer": layer, "criterion": criterion, "score": value}
    return row if error is None else row | {"std_error": error}


def _share_among_units(losses: torch.Tensor, blocks: Sequence[torch.Tensor], num_units: int) -> torch.Tensor:
    """One score per unit, in units of loss: its part of its block's."""
    value = torch.empty(num_units, dtype=torch.float64)
    for loss, block in zip(losses.tolist(), blocks, strict=True):
        value[block] = loss / len(block)
    return value


def _spread_over_units(order: torch.Tensor, blocks: Sequence[torch.Tensor], num_units: int) -> torch.Tensor:
    """One score per unit: blocks in their order, the units of a block in the block's own order."""
    value = torch.empty(num_units, dtype=torch.float64)
    for rank, index in enumerate(order.argsort(stable=True).tolist()):
        value[blocks[index]] = rank + torch.arange(len(blocks[index]), dtype=torch.float64) / len(blocks[index])
    return value
