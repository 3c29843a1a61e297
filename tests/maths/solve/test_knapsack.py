"""The exact choice under a budget, against every combination there is."""

from __future__ import annotations

import itertools
import random

import pytest

from tinygn_dist.maths.solve.knapsack import cheapest


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_costs_less(seed: int):
    draw = random.Random(seed)
    costs = []
    for _ in range(4):
        counts = [0, *sorted(draw.sample(range(1, 13), draw.randint(0, 4)))]
        costs.append({count * draw.choice([1, 4]): draw.uniform(-1, 3) for count in counts})
    for total in range(sum(map(max, costs)) + 1):
        found = cheapest(costs, total)
        assert sum(found) >= total
        combinations = [each for each in itertools.product(*costs) if sum(each) >= total]
        least = min(sum(cost[n] for cost, n in zip(costs, each, strict=True)) for each in combinations)
        assert sum(cost[n] for cost, n in zip(costs, found, strict=True)) == pytest.approx(least)


def test_what_cannot_be_reached_is_refused():
    with pytest.raises(ValueError, match="add up to 12, not to 13"):
        cheapest([{0: 0.0, 8: 1.0}, {0: 0.0, 4: 1.0}], 13)
