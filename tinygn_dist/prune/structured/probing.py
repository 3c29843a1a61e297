"""Scores of layers and units: the change in loss when they are removed.

Single removals misjudge sets: two units that can replace each other both look free. So layers are removed one by one,
and the best candidates are probed again without those that are gone (or compared by something better,
`layer_order.py`). With `prune.probes.greedy` the same is done for other units. All of it stays within one budget of
forwards and minutes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tinygn_dist.config import ProbeConfig
from tinygn_dist.estimate.elimination import Choice, Limit, Ranking, successive_elimination
from tinygn_dist.estimate.probes import Probe
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.anatomy import UnitGroup

REPROBED = 4
"""candidates probed again after each removed one: removing one changes what the others are worth"""
MANY = 64
"""units per group above which single probes are too many, and the report lists none"""


@dataclass
class UnitScores:
    """by_group: (kind, layer) -> (units,) scores; a missing group is chosen by its solver. layer_order: layers, the
    first to go first. table: rows of the report. forwards: probe passes spent; exhaustive: what removal probes would
    have taken on every sequence; open: groups whose choice noise or the budget left open. steps: of gate derivatives,
    by kind and layer, with what was measured to choose them. kinked: gates at which the loss has no derivative. notes:
    for the reader of the report."""

    by_group: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    layer_order: list[int] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    forwards: int = 0
    exhaustive: int = 0
    open: int = 0
    started: float = field(default_factory=time.monotonic)
    steps: list[dict[str, Any]] = field(default_factory=list)
    kinked: int = 0
    notes: list[str] = field(default_factory=list)


class Prober:
    """Removal probes of one problem, within what is left of the budget. What they find and take is added to
    `scores`."""

    def __init__(self, scores: UnitScores, problem: Problem, options: ProbeConfig) -> None:
        self.scores, self.problem, self.options = scores, problem, options

    @property
    def limit(self) -> Limit:
        """The budget that is left."""
        forwards, minutes = self.options.forwards, self.options.minutes
        return Limit(
            float("inf") if forwards is None else forwards - self.scores.forwards,
            float("inf") if minutes is None else self.scores.started + 60 * minutes,
        )

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left of it. The same on every rank."""
        limit = self.limit
        return limit.forwards <= 0 or limit.is_late(self.problem.backend)

    def count(self, forwards: int, exhaustive: int | None = None) -> None:
        """Forwards of other work that the budget includes. exhaustive: more, where something cut them short."""
        self.scores.forwards += forwards
        self.scores.exhaustive += forwards if exhaustive is None else exhaustive

    def rank(self, probes: Sequence[Probe], choices: Sequence[Choice], without: Sequence[Probe] = ()) -> Ranking:
        """Successive elimination. without: what is already gone."""
        adaptive = self.options.adaptive and bool(choices)
        found = successive_elimination(
            self.problem, probes, choices, adaptive=adaptive, without=without, limit=self.limit
        )
        self.count(found.forwards, found.exhaustive)
        self.scores.open += found.open
        return found

    def greedy(self, probes: Sequence[Probe], choices: Sequence[Choice], ranking: Ranking) -> list[int]:
        """Indices in the order they go, each after the best few have been measured again without those before it. What
        the budget does not measure again goes by its first ranking."""
        order = RemovalOrder(choices, ranking)
        while able := order.candidates():
            if order.removed and not self.exhausted:
                best, without = able[:REPROBED], [probes[i] for i in order.removed]
                some = [probes[i] for i in best]
                again = self.rank(some, [Choice(tuple(range(len(some))), 1)], without)
                self.report(some, again, without)
                order.update(dict(zip(best, again.mean.tolist(), strict=True)))
            order.remove_least()
        return order.removed

    def report(self, probes: Sequence[Probe], ranking: Ranking, without: Sequence[Probe] | None = None) -> None:
        """Lists losses in the report. without: what was gone when they were measured; None where nothing ever is."""
        for probe, loss, error in zip(probes, ranking.mean.tolist(), ranking.error.tolist(), strict=True):
            kind = probe.group.kind if probe.group else "layers"
            row = row_of(kind, probe.layer, "removal", loss, error)
            if probe.group:
                row |= {"unit": probe.units[0], "units": len(probe.units)}
            self.scores.table.append(row if without is None else row | {"without": [_name(gone) for gone in without]})


class RemovalOrder:
    """What goes, one after the other: of the candidates whose choice has room the one with the least known loss."""

    def __init__(self, choices: Sequence[Choice], ranking: Ranking) -> None:
        self._place, self._losses = ranking.place.tolist(), dict[int, float]()
        for choice in choices:  # decisions on few sequences are final, whatever the means became on more
            in_order = sorted(choice.candidates, key=lambda i: self._place[i])
            rising = itertools.accumulate((float(ranking.mean[i]) for i in in_order), max)
            self._losses |= zip(in_order, rising, strict=True)
        self._room = [choice.removed for choice in choices]
        self._choice_of = {index: number for number, choice in enumerate(choices) for index in choice.candidates}
        self.removed: list[int] = []
        """indices, the first to go first"""

    def candidates(self) -> list[int]:
        """Those that may go next, best first."""
        able = [i for i in self._losses if self._room[self._choice_of[i]] > 0 and i not in self.removed]
        return sorted(able, key=self._key)

    def update(self, losses: Mapping[int, float]) -> None:
        """New losses of some."""
        self._losses |= losses

    def remove_least(self, among: Iterable[int] = ()) -> None:
        """The best candidate goes. among: only these may; all by default."""
        best = min(among or self.candidates(), key=self._key)
        self.removed.append(best)
        self._room[self._choice_of[best]] -= 1

    def _key(self, index: int) -> tuple[float, int, int]:
        return self._losses[index], self._place[index], index


def order_layers(prober: Prober, layers: Sequence[int], removed: int) -> list[int]:
    """The order in which `removed` of these layers go: probe all once, then greedily."""
    probes = [Probe(layer) for layer in layers]
    ranking = rank_layers(prober, probes, [1, 1 + REPROBED])
    return [layers[i] for i in prober.greedy(probes, [Choice(tuple(range(len(layers))), removed)], ranking)]


def rank_layers(prober: Prober, probes: Sequence[Probe], places: Sequence[int]) -> Ranking:
    """Of single removals. places: those that have to be sure."""
    everyone = tuple(range(len(probes)))
    ranking = prober.rank(probes, [Choice(everyone, place) for place in places])
    prober.report(probes, ranking, [])
    return ranking


@dataclass(frozen=True)
class ProbedGroup:
    """A group of units, and the blocks of them that are removed together: one probe per block. removed: how many units
    go; least: or as few as this, where a mix decides later."""

    group: UnitGroup
    blocks: Sequence[torch.Tensor]
    removed: int
    least: int

    @property
    def most_blocks(self) -> int:
        return min(math.ceil(self.removed / len(self.blocks[0])), len(self.blocks))

    def probes(self) -> list[Probe]:
        return [Probe(self.group.layer, self.group, tuple(block.tolist())) for block in self.blocks]


def unit_losses(prober: Prober, groups: Sequence[ProbedGroup]) -> list[torch.Tensor]:
    """(units,) fp64 scores of each group: losses per token for filters, which compete everywhere; for other kinds only
    ranks within a group."""
    probes = [probe for one in groups for probe in one.probes()]
    starts = list(itertools.accumulate((len(one.blocks) for one in groups), initial=0))
    choices = [
        Choice(tuple(range(start, start + len(one.blocks))), one.most_blocks)
        for start, one in zip(starts, groups, strict=False)
    ]
    as_losses = groups[0].group.kind == "filters"
    open_ = [
        replace(choice, removed=count)
        for choice, one in zip(choices, groups, strict=True)
        for count in range(min(one.least, choice.removed), choice.removed + 1)
    ]
    ranking = prober.rank(probes, [] if as_losses else open_)
    prober.report(probes, ranking)
    values = ranking.mean if as_losses else ranking.place.double()
    if prober.options.greedy and not as_losses:
        values = _places(prober.greedy(probes, choices, ranking), ranking)
    spread = _share_among_units if as_losses else _spread_over_units
    return [
        spread(values[start : start + len(one.blocks)], one.blocks, one.group.num_units)
        for start, one in zip(starts, groups, strict=False)
    ]


def _places(removed: Sequence[int], ranking: Ranking) -> torch.Tensor:
    """(probes,) in what order units go: those that are removed, then the others by their places."""
    places = len(ranking.place) + ranking.place.double()
    places[list(removed)] = torch.arange(len(removed), dtype=torch.float64)
    return places


def _name(probe: Probe) -> int | list[int]:
    """A layer; a unit as [layer, unit]."""
    return [probe.layer, probe.units[0]] if probe.group else probe.layer


def row_of(kind: str, layer: int, criterion: str, value: float, error: float | None = None) -> dict[str, Any]:
    row = {"kind": kind, "layer": layer, "criterion": criterion, "score": value}
    return row if error is None else row | {"std_error": error}


def _share_among_units(losses: torch.Tensor, blocks: Sequence[torch.Tensor], num_units: int) -> torch.Tensor:
    """One score per unit, in units of loss: an equal part of its block's."""
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
