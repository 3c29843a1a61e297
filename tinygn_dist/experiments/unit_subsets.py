"""What units are worth together: pairs, and random subsets with a regression on who was in them.

Removed one at a time, two units that can stand in for each other both look free. Where many go at once, in every layer,
what counts is their effect in that company: so subsets as large as what will go are drawn, the loss without each is
measured, and a ridge regression shares it out (Bonsai, Dery et al. 2024, arXiv 2402.05406). It starts from the losses of
single removals, scaled to what the subsets show, and learns where they were wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tinygn_dist.estimate.elimination import Contest
from tinygn_dist.estimate.probes import Measured, Probe, measure, together
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths import confidence
from tinygn_dist.maths.counter_rng import key_of, uniform

PENALTIES = tuple(4.0**k for k in range(-6, 9))


@dataclass(frozen=True)
class Effects:
    """mean, error: per unit (or pair) fp64, in loss per token, and its standard error. forwards: probe passes."""

    mean: torch.Tensor
    error: torch.Tensor
    forwards: int


def interactions(problem: Problem, pairs: Sequence[tuple[Probe, Probe]]) -> Effects:
    """By how much the loss without both is larger than the two single losses say: f(uv) - f(u) - f(v) + f. Positive for units
    that stand in for each other."""
    singles = list(dict.fromkeys(probe for pair in pairs for probe in pair))
    seen = measure(problem, [*singles, *map(together, pairs)])
    alone = {probe: row for probe, row in zip(singles, seen.differences, strict=False)}
    beyond = [
        both - alone[one] - alone[other]
        for both, (one, other) in zip(seen.differences[len(singles) :], pairs, strict=True)
    ]
    return Effects(*confidence.ratio_mean(torch.stack(beyond), seen.counts), seen.forwards)


def pairs_of(contests: Sequence[Contest], losses: torch.Tensor, most: int) -> list[tuple[int, int]]:
    """At most so many pairs of units that could both go, those of the units with the least single losses first."""
    number = {index: number for number, contest in enumerate(contests) for index in contest.probes if contest.removed}
    order = sorted(number, key=lambda i: (float(losses[i]), i))
    both = (
        (i, j)
        for second, j in enumerate(order)
        for i in order[:second]
        if number[i] != number[j] or contests[number[i]].removed > 1
    )
    return list(itertools.islice(both, most))


def effects_together(
    problem: Problem,
    probes: Sequence[Probe],
    contests: Sequence[Contest],
    alone: torch.Tensor,
    count: int,
    *,
    seed: int = 0,
    look: Callable[..., Measured] = measure,
) -> Effects:
    """Each unit's part in the loss of `count` random subsets, all of which remove what the contests say. alone: (probes,)
    losses of single removals. Only differences within a contest mean anything. The same at any number of ranks."""
    chosen = draw(len(probes), contests, count, seed)
    seen = look(problem, [together(probes[i] for i in row.nonzero().flatten().tolist()) for row in chosen])
    losses = seen.differences.sum(1) / seen.counts.sum()
    return Effects(*shared_out(chosen.double(), losses, alone), seen.forwards)


def draw(num_probes: int, contests: Sequence[Contest], count: int, seed: int) -> torch.Tensor:
    """(count, probes) bool. In each contest consecutive subsets are consecutive pieces of one random order, so that every unit is
    in equally many (but one)."""
    chosen = torch.zeros(count, num_probes, dtype=torch.bool)
    for number, contest in enumerate(contests):
        members, left, round_ = torch.tensor(contest.probes), [], 0
        for row in chosen:
            taken: list[int] = []
            while len(taken) < contest.removed:
                if not left:
                    left = uniform(0, len(members), key_of(seed, f"subsets/{number}/{round_}")).argsort().tolist()
                    round_ += 1
                left.sort(key=lambda index: index in taken)  # a new order may begin inside a subset: none twice
                taken.append(left.pop(0))
            row[members[taken]] = True
    return chosen


def shared_out(chosen: torch.Tensor, losses: torch.Tensor, alone: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(probes,) effects and their standard errors: losses ~ a + b * (sum of single losses) + ridge, a and b >= 0 by least squares,
    the ridge's penalty by generalised cross-validation.

    chosen: (subsets, probes) fp64 0 or 1. losses: (subsets,). alone: (probes,).
    """
    expected = chosen @ alone
    centred = expected - expected.mean()
    spread = centred.square().sum()
    scale = (centred @ losses / spread).clamp(min=0) if spread > 0 else torch.ones((), dtype=torch.float64)
    rest = losses - losses.mean() - scale * centred
    left, values, right = torch.linalg.svd(chosen - chosen.mean(0), full_matrices=False)
    parts, number = left.t() @ rest, len(losses)
    outside = rest.square().sum() - parts.square().sum()

    def cross_validated(penalty: float) -> float:
        kept = values.square() / (values.square() + penalty)
        wrong = outside + ((1 - kept) * parts).square().sum()
        return float(number * wrong / (number - 1 - kept.sum()).clamp(min=1e-9) ** 2)

    penalty = min(PENALTIES, key=cross_validated)
    shrunk = values / (values.square() + penalty)
    kept = values * shrunk
    free = max(float(number - 2 - kept.sum()), 1.0)
    noise = (outside + ((1 - kept) * parts).square().sum()).clamp(min=0) / free
    errors = (noise * (right.t() * shrunk).square().sum(1)).sqrt()
    return scale * alone + right.t() @ (shrunk * parts), errors
