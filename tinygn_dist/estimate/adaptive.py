"""Removal probes on more and more sequences, only where it is still open what goes (successive elimination).

Units of one group compete for being among the `removed` with the smallest loss. After each round a unit is out of the
contest when its interval (mean +- 2 standard errors) says so: fewer than `removed` others can still be below it, or at
least `removed` others surely are. Every round doubles the sequences of those that stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tinygn_dist import score
from tinygn_dist.estimate.probes import Measured, Probe, measure
from tinygn_dist.estimate.setting import Setting, batch_size

WIDTH = 2.0
"""standard errors to each side"""
FIRST = 8
"""the first round takes this part of the sequences, but at least two: one has no error"""


@dataclass(frozen=True)
class Contest:
    """probes: who competes. removed: how many of them go."""

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
    sequences: (probes,) how many. open: contests in which something was undecided at the end. exhaustive: forwards that
    all probes on all sequences would have taken."""

    mean: torch.Tensor
    error: torch.Tensor
    sequences: torch.Tensor
    open: int
    forwards: int
    exhaustive: int


def race(
    setting: Setting, probes: Sequence[Probe], contests: Sequence[Contest], *, without: Sequence[int] = (),
    limit: Limit | None = None, look: Callable[..., Measured] = measure,
) -> Standing:  # fmt: skip
    """Probe until every contest is settled, the sequences are used up, or the limit is reached (after at least one
    round). Without contests everything is probed on all sequences. The same on any number of ranks, unless a deadline
    ends it. look: what measures (or replays what was measured before)."""
    limit = limit or Limit()
    count, sizes = len(probes), [batch_size(batch) for batch in setting.batches]
    mean, error = torch.zeros(count, dtype=torch.float64), torch.full((count,), torch.inf, dtype=torch.float64)
    sequences = torch.zeros(count, dtype=torch.int64)
    differences, counts = torch.zeros(count, sum(sizes), dtype=torch.float64), torch.zeros(sum(sizes)).double()
    active, done, forwards = list(range(count)), 0, 0
    for upto in _rounds(sizes) if contests or limit != Limit() else [len(sizes)]:
        seen = look(replace(setting, batches=setting.batches[done:upto]), [probes[i] for i in active], without=without)
        span = slice(sum(sizes[:done]), sum(sizes[:upto]))
        differences[active, span], counts[span] = seen.differences, seen.counts
        forwards, done = forwards + seen.forwards, upto
        mean[active], error[active] = score.ratio_mean(differences[active, : span.stop], counts[: span.stop])
        sequences[active] = span.stop
        if contests:
            active = sorted(set().union(*(undecided(mean, error, contest) for contest in contests)))
        if not active or forwards >= limit.forwards or _late(setting, limit):
            break
    still = sum(bool(undecided(mean, error, contest)) for contest in contests)
    return Standing(mean, error, sequences, still, forwards, count * len(sizes))


def undecided(mean: torch.Tensor, error: torch.Tensor, contest: Contest) -> set[int]:
    """Probes of a contest of which it is open whether they are among the `removed` smallest."""
    indices = torch.tensor(contest.probes)
    if contest.removed <= 0 or contest.removed >= len(indices):
        return set()
    low, high = mean[indices] - WIDTH * error[indices], mean[indices] + WIDTH * error[indices]
    below = (high[None] < low[:, None]).sum(1)  # surely smaller than this one
    maybe = (low[None] < high[:, None]).sum(1) - 1  # possibly smaller, itself not counted
    open_ = (below < contest.removed) & (maybe >= contest.removed)
    return set(indices[open_].tolist())


def _rounds(sizes: Sequence[int]) -> list[int]:
    """Numbers of micro-batches to have measured after each round."""
    first, total = 0, 0
    while first < len(sizes) and (total < 2 or first < len(sizes) / FIRST):
        total += sizes[first]
        first += 1
    rounds = [first]
    while rounds[-1] < len(sizes):
        rounds.append(min(2 * rounds[-1], len(sizes)))
    return rounds


def _late(setting: Setting, limit: Limit) -> bool:
    return limit.deadline < float("inf") and any(setting.backend.everyone(time.monotonic() > limit.deadline))
