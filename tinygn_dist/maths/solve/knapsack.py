"""Exact choice under a budget (multiple-choice knapsack, by dynamic programming over the sums)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch


def cheapest(costs: Sequence[Mapping[int, float]], total: int) -> list[int]:
    """One count of each mapping (count -> cost), with the least sum of costs among those whose counts add up to `total`
    or more. ValueError where even the largest counts do not."""
    if sum(max(cost) for cost in costs) < total:
        raise ValueError(f"the largest counts add up to {sum(max(cost) for cost in costs)}, not to {total}")
    unit = math.gcd(*(count for cost in costs for count in cost)) or 1
    least = torch.full((-(-total // unit) + 1,), math.inf, dtype=torch.float64)  # by sum; the last one: that or more
    least[0] = 0
    taken = []
    for cost in costs:
        best, choice = torch.full_like(least, math.inf), torch.zeros(len(least), dtype=torch.int64)
        for count in sorted(cost):
            reached = torch.full_like(least, math.inf)
            shift = min(count // unit, len(least) - 1)
            reached[shift:] = least[: len(least) - shift]
            reached[-1] = least[len(least) - 1 - shift :].min()
            better = reached + cost[count] < best
            best[better], choice[better] = (reached + cost[count])[better], count
        taken.append((least, choice))
        least = best
    sums, counts = len(least) - 1, []
    for before, choice in reversed(taken):
        counts.append(int(choice[sums]))
        low = sums - min(counts[-1] // unit, len(least) - 1)
        sums = low if sums < len(least) - 1 else low + int(before[low:].argmin())
    return counts[::-1]
