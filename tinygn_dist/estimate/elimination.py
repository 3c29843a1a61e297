"""Successive elimination: removal probes on more and more sequences, only where the choice is still open.

Candidates compete for being among the `removed` with the smallest loss on all sequences. They are compared in pairs on
the same sequences: most of what a sequence does to the loss without one unit it does to the loss without another. The
question is only what *these* sequences say: after n of N of them, the difference of two means over all N is known up to
sqrt(1 - n / N) of its standard error. After each round a candidate is decided when enough others are smaller, or
larger, more surely than LEVEL. A decision is final; the others are probed on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tinygn_dist.backends.base import Backend
from tinygn_dist.estimate.probes import Measured, Probe, measure
from tinygn_dist.estimate.problem import Problem, batch_size
from tinygn_dist.maths import confidence

LEVEL = 1.55
"""standard normal deviates (6 % of pairs that are alike): on KV groups of SmolLM2-135M the least with which 95 % of the
units are those of all sequences"""
CLEAR = 2.0
"""standard errors between the removed and the kept, of any sequences, for a choice that the report does not call
open"""
FIRST = 8
"""the first round takes this fraction of the sequences, but at least three: the error that two show may be anything"""


@dataclass(frozen=True)
class Choice:
    """candidates: indices of probes that compete. removed: how many of them go. Where it is open how many will, there
    is a choice for each number."""

    candidates: tuple[int, ...]
    removed: int


@dataclass(frozen=True)
class Limit:
    """When to stop although something is open. forwards: over all ranks. deadline: of time.monotonic()."""

    forwards: float = float("inf")
    deadline: float = float("inf")

    def is_late(self, backend: Backend) -> bool:
        """Whether the deadline has passed on any rank; the same on all. A collective where there is a deadline."""
        return self.deadline < float("inf") and any(backend.everyone(time.monotonic() > self.deadline))


@dataclass(frozen=True)
class Ranking:
    """mean, error: (probes,) fp64 loss change per token and its standard error, from each probe's own sequences.
    sequences: (probes,) how many. place: (probes,) int64 place in the probe's choice, 0 the first to go; a decision on
    few sequences is final, whatever others' means became on more. open: choices in which noise or the limit leaves open
    what goes. forwards: probe passes spent; exhaustive: what all probes on all sequences would have taken."""

    mean: torch.Tensor
    error: torch.Tensor
    sequences: torch.Tensor
    place: torch.Tensor
    open: int
    forwards: int
    exhaustive: int


class Elimination:
    """Round after round: `while elimination.wants_more(backend): elimination.add(what was measured)`."""

    def __init__(
        self, count: int, sizes: Sequence[int], choices: Sequence[Choice], *, adaptive: bool = True, limit: Limit
    ) -> None:
        """count: probes. sizes: sequences of each micro-batch. Probes of no choice, and without `adaptive` all, are
        measured on all sequences, or until the limit is reached after at least one round."""
        self._sizes, self._choices, self._adaptive, self._limit = list(sizes), choices, adaptive, limit
        self._rounds = _rounds(sizes) if adaptive or limit != Limit() else [len(sizes)]
        self._undecided = [_Undecided(choice) for choice in choices]
        self._differences = torch.zeros(count, sum(sizes), dtype=torch.float64)
        self._counts = torch.zeros(sum(sizes), dtype=torch.float64)
        self._sequences = torch.zeros(count, dtype=torch.int64)
        self._forwards = self._done = 0
        self.active = list(range(count))
        """indices of the probes of this round"""

    @property
    def batches(self) -> slice:
        """The micro-batches of this round."""
        return slice(self._done, self._rounds[0])

    def wants_more(self, backend: Backend) -> bool:
        """Whether there is another round; the same on every rank unless a deadline ends it."""
        if not self._rounds:
            return False
        return not self._done or bool(
            self.active and self._forwards < self._limit.forwards and not self._limit.is_late(backend)
        )

    def add(self, measured: Measured) -> None:
        """The losses of the active probes on this round's micro-batches."""
        upto = self._rounds.pop(0)
        span = slice(sum(self._sizes[: self._done]), sum(self._sizes[:upto]))
        self._differences[self.active, span], self._counts[span] = measured.differences, measured.counts
        self._sequences[self.active] = span.stop
        self._forwards, self._done = self._forwards + measured.forwards, upto
        if self._adaptive:
            for one in self._undecided:
                one.decide(self._differences, self._counts[: span.stop], sum(self._sizes))
            left = {i for one in self._undecided for i in one.left}
            final = {i for one in self._undecided for i in (*one.goes, *one.stays)} - left
            self.active = [i for i in self.active if i not in final]

    def ranking(self) -> Ranking:
        count, sequences = len(self._sequences), self._sequences
        mean, error = torch.empty(2, count, dtype=torch.float64)
        for number in sequences.unique().tolist():
            own = sequences == number
            mean[own], error[own] = confidence.ratio_mean(self._differences[own, :number], self._counts[:number])
        place, sides = torch.arange(count), torch.zeros(count)
        for one in self._undecided:
            sides[one.goes] -= 1
            sides[one.stays] += 1
        for choice in self._choices:
            order = sorted(choice.candidates, key=lambda i: (float(sides[i]), float(mean[i]), i))
            place[order] = torch.arange(len(order))
        still = sum(self._is_open(choice, place) for choice in self._choices)
        return Ranking(mean, error, sequences, place, still, self._forwards, count * len(self._sizes))

    def _is_open(self, choice: Choice, place: torch.Tensor) -> bool:
        """Whether some unit that goes is not surely smaller than each that stays, beyond these sequences."""
        members = torch.tensor(choice.candidates)
        for number in self._sequences[members].unique().tolist():
            far = members[self._sequences[members] >= number]
            apart, error = confidence.paired(self._differences[far, :number], self._counts[:number])
            goes, own = place[far] < choice.removed, self._sequences[far]
            both = torch.minimum(own[:, None], own[None]) == number
            if bool(((apart <= CLEAR * error) & both & goes[:, None] & ~goes[None]).any()):
                return True
        return False


def successive_elimination(
    problem: Problem,
    probes: Sequence[Probe],
    choices: Sequence[Choice],
    *,
    adaptive: bool = True,
    without: Sequence[Probe] = (),
    limit: Limit = Limit(),  # noqa: B008 (frozen)
) -> Ranking:
    """Probe until every choice is decided, the sequences are used up, or the limit is reached (after at least one
    round). without: layers and units that are already gone. The same on any number of ranks, unless a deadline ends
    it."""
    sizes = [batch_size(batch) for batch in problem.batches]
    elimination = Elimination(len(probes), sizes, choices, adaptive=adaptive, limit=limit)
    while elimination.wants_more(problem.backend):
        some = replace(problem, batches=problem.batches[elimination.batches])
        elimination.add(measure(some, [probes[i] for i in elimination.active], without=without))
    return elimination.ranking()


def decided(
    differences: torch.Tensor, counts: torch.Tensor, removed: int, total: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(units,) bool each: surely among the `removed` with the smallest loss on all `total` sequences, and surely not.

    differences: (units, sequences) fp64 on the sequences so far. counts: (sequences,).
    """
    apart, error = confidence.paired(differences, counts)
    number = len(counts)
    larger = apart > 0
    if number < total:
        larger &= confidence.normal_of_t(apart / (error * math.sqrt(1 - number / total)), number - 1) > LEVEL
    return larger.sum(1) >= len(apart) - removed, larger.sum(0) >= removed


class _Undecided:
    """A choice, and what of it is decided."""

    def __init__(self, choice: Choice) -> None:
        self.choice, self.left = choice, list(choice.candidates)
        self.goes: list[int] = []
        self.stays: list[int] = []

    def decide(self, differences: torch.Tensor, counts: torch.Tensor, total: int) -> None:
        """Looks at those left, after a round. counts: of the sequences so far."""
        again = True
        while again and self.left:
            removed = self.choice.removed - len(self.goes)
            goes, stays = decided(differences[self.left, : len(counts)], counts, removed, total)
            sides = list(zip(self.left, goes.tolist(), stays.tolist(), strict=True))
            self.goes += [i for i, sure, _ in sides if sure]
            self.stays += [i for i, _, sure in sides if sure]
            self.left = [i for i, *sure in sides if not any(sure)]
            again = len(self.left) < len(sides)  # those left may now be decided among themselves


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
