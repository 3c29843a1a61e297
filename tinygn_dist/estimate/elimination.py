"""Removal probes on more and more sequences, only where it is still open what goes (successive elimination).

Units of one group compete for being among the `removed` with the smallest loss on all sequences. They are compared in
pairs, on the same sequences: most of what a sequence does to the loss without one unit it does to that without another.
And what is asked is only what *these* sequences say: after n of N of them, the difference of two units' means over all N
is known up to sqrt(1 - n / N) of its standard error. After each round a unit is out of the contest when enough others
are smaller, or larger, more surely than LEVEL. It goes, or stays, for good; the others are probed on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tinygn_dist.estimate.probes import Measured, Probe, measure
from tinygn_dist.estimate.problem import Problem, batch_size
from tinygn_dist.maths import confidence

LEVEL = 1.55
"""standard normal deviates (6 % of pairs that are alike): on KV groups of SmolLM2-135M the least with which 95 % of the units are
those of all sequences"""
CLEAR = 2.0
"""standard errors between what goes and what stays, of any sequences, for a choice that the report does not call open"""
FIRST = 8
"""the first round takes this part of the sequences, but at least three: the error that two show may be anything"""


@dataclass(frozen=True)
class Contest:
    """probes: who competes. removed: how many of them go. Where it is open how many will, there is a contest for each number."""

    probes: tuple[int, ...]
    removed: int


@dataclass(frozen=True)
class Limit:
    """When to stop although something is open. forwards: over all ranks. deadline: of time.monotonic()."""

    forwards: float = float("inf")
    deadline: float = float("inf")


@dataclass(frozen=True)
class Standing:
    """mean, error: (probes,) fp64 loss change per token and its standard error, from each probe's own sequences.
    sequences: (probes,) how many. place: (probes,) int64 place in the probe's contest, 0 the first to go; what was decided on
    few sequences stands, whatever others' means became on more. open: contests in which noise or the limit leaves open what
    goes. exhaustive: forwards that all probes on all sequences would have taken."""

    mean: torch.Tensor
    error: torch.Tensor
    sequences: torch.Tensor
    place: torch.Tensor
    open: int
    forwards: int
    exhaustive: int


def successive_elimination(
    problem: Problem, probes: Sequence[Any], contests: Sequence[Contest], *, adaptive: bool = True,
    without: Sequence[Probe] = (), limit: Limit | None = None, look: Callable[..., Measured] = measure,
) -> Standing:  # fmt: skip
    """Probe until every contest is settled, the sequences are used up, or the limit is reached (after at least one
    round). Probes of no contest, and without `adaptive` all, are measured on all sequences. The same on any number of ranks,
    unless a deadline ends it. look: what measures probes, or whatever competes in their place."""
    limit = limit or Limit()
    count, sizes = len(probes), [batch_size(batch) for batch in problem.batches]
    sequences, differences = torch.zeros(count, dtype=torch.int64), torch.zeros(count, sum(sizes), dtype=torch.float64)
    counts = torch.zeros(sum(sizes), dtype=torch.float64)
    running = [_Running(contest) for contest in contests]
    active, done, forwards = list(range(count)), 0, 0
    for upto in _rounds(sizes) if adaptive or limit != Limit() else [len(sizes)]:
        seen = look(replace(problem, batches=problem.batches[done:upto]), [probes[i] for i in active], without=without)
        span = slice(sum(sizes[:done]), sum(sizes[:upto]))
        differences[active, span], counts[span] = seen.differences, seen.counts
        forwards, done = forwards + seen.forwards, upto
        sequences[active] = span.stop
        if adaptive:
            for one in running:
                one.settle(differences, counts[: span.stop], sum(sizes))
            resolve_estimator = {i for one in running for i in one.resolve_estimator}.difference(
                *(one.left for one in running)
            )
            active = [i for i in active if i not in resolve_estimator]
        if not active or forwards >= limit.forwards or late(problem, limit):
            break
    mean, error = torch.empty(2, count, dtype=torch.float64)
    for number in sequences.unique().tolist():
        own = sequences == number
        mean[own], error[own] = confidence.ratio_mean(differences[own, :number], counts[:number])
    place = torch.arange(count)
    sides = torch.zeros(count)
    for one in running:
        sides[one.goes] -= 1
        sides[one.stays] += 1
    for contest in contests:
        order = sorted(contest.probes, key=lambda i: (float(sides[i]), float(mean[i]), i))
        place[order] = torch.arange(len(order))
    still = sum(_is_open(contest, differences, counts, sequences, place) for contest in contests)
    return Standing(mean, error, sequences, place, still, forwards, count * len(sizes))


def decided(
    differences: torch.Tensor, counts: torch.Tensor, removed: int, total: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(units,) bool: which units are among the `removed` with the smallest loss on all `total` sequences, as surely as LEVEL
    says; and which are not.

    differences: (units, sequences) fp64 on the sequences seen so far. counts: (sequences,).
    """
    apart, error = confidence.paired(differences, counts)
    seen = len(counts)
    larger = apart > 0
    if seen < total:
        larger &= confidence.normal_of_t(apart / (error * math.sqrt(1 - seen / total)), seen - 1) > LEVEL
    return larger.sum(1) >= len(apart) - removed, larger.sum(0) >= removed


class _Running:
    """A contest, and what of it is decided."""

    def __init__(self, contest: Contest) -> None:
        self.contest, self.left = contest, list(contest.probes)
        self.goes: list[int] = []
        self.stays: list[int] = []

    @property
    def resolve_estimator(self) -> list[int]:
        return self.goes + self.stays

    def settle(self, differences: torch.Tensor, counts: torch.Tensor, total: int) -> None:
        """Looks at those left, after a round. counts: of the sequences so far."""
        settling = True
        while settling and self.left:
            removed = self.contest.removed - len(self.goes)
            goes, stays = decided(differences[self.left, : len(counts)], counts, removed, total)
            sides = list(zip(self.left, goes.tolist(), stays.tolist(), strict=True))
            self.goes += [i for i, sure, _ in sides if sure]
            self.stays += [i for i, _, sure in sides if sure]
            self.left = [i for i, *sure in sides if not any(sure)]
            settling = len(self.left) < len(sides)  # who is left may now be settled among themselves


def _is_open(
    contest: Contest, differences: torch.Tensor, counts: torch.Tensor, sequences: torch.Tensor, place: torch.Tensor
) -> bool:
    """Whether some unit that goes is not surely smaller than each that stays, beyond these sequences."""
    members = torch.tensor(contest.probes)
    for number in sequences[members].unique().tolist():
        seen = members[sequences[members] >= number]
        apart, error = confidence.paired(differences[seen, :number], counts[:number])
        goes = place[seen] < contest.removed
        both = torch.minimum(sequences[seen][:, None], sequences[seen][None]) == number
        if bool(((apart <= CLEAR * error) & both & goes[:, None] & ~goes[None]).any()):
            return True
    return False


def _rounds(sizes: Sequence[int]) -> list[int]:
    """Numbers of micro-batches to have measured after each round."""
    first, total = 0, 0
    while first < len(sizes) and (total < 3 or first < len(sizes) / FIRST):
        total += sizes[first]
        first += 1
    rounds = [first]
    while rounds[-1] < len(sizes):
        rounds.append(min(rounds[-1] + max(1, rounds[-1] // 4), len(sizes)))
    return rounds


def late(problem: Problem, limit: Limit) -> bool:
    """Whether the deadline is over on any rank; the same on all."""
    return limit.deadline < float("inf") and any(problem.backend.everyone(time.monotonic() > limit.deadline))
