"""Successive elimination: what is decided is right, what is open is probed on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import tiny
from tinygn_dist import score
from tinygn_dist.estimate import adaptive
from tinygn_dist.estimate.adaptive import Contest, Limit, race, undecided
from tinygn_dist.estimate.probes import Measured, Probe, measure, single_units


def test_undecided_are_those_whose_interval_reaches_the_boundary():
    mean, error = torch.tensor([0.0, 1.0, 1.2, 3.0]).double(), torch.full((4,), 0.2).double()
    everyone = tuple(range(4))
    assert undecided(mean, error, Contest(everyone, 1)) == set()
    assert undecided(mean, error, Contest(everyone, 2)) == {1, 2}
    assert undecided(mean, error, Contest(everyone, 3)) == set()
    assert undecided(mean, error, Contest((0, 3), 2)) == undecided(mean, error, Contest((0, 3), 0)) == set()
    assert undecided(mean, torch.full((4,), torch.inf).double(), Contest(everyone, 2)) == set(everyone)


def test_rounds_double_and_start_with_two_sequences():
    assert adaptive._rounds([1] * 8) == [2, 4, 8] and adaptive._rounds([1] * 64) == [8, 16, 32, 64]
    assert adaptive._rounds([4, 4, 4]) == [1, 2, 3] and adaptive._rounds([1]) == [1]


@pytest.mark.parametrize("seed", range(5))
def test_a_race_chooses_like_exhaustive_probing_with_fewer_forwards(backend, seed: int):
    """20 groups of 9 units, 32 sequences, effects spread over two decades and noise like them: at least 95 % of the units
    as all sequences say, for at most half of the forwards."""
    draw = torch.Generator().manual_seed(seed)
    effects = 10 ** (2 * torch.rand(180, 1, generator=draw, dtype=torch.float64) - 2)
    noisy = effects * (1 + 0.7 * torch.randn(180, 32, generator=draw, dtype=torch.float64))
    batches = [{"x": torch.tensor([[i]])} for i in range(32)]

    def look(setting, asked, *, without=()):
        columns = [int(batch["x"]) for batch in setting.batches]
        rows = [probe.layer for probe in asked]
        ones = torch.ones(len(columns), dtype=torch.float64)
        return Measured(noisy[rows][:, columns], ones, ones, len(rows) * len(columns))

    setting = replace(tiny.setting("llama", backend), batches=batches)
    contests = [Contest(tuple(range(9 * g, 9 * g + 9)), 3) for g in range(20)]
    found = race(setting, [Probe(i) for i in range(180)], contests, look=look)
    exact, _ = score.ratio_mean(noisy, torch.ones(32, dtype=torch.float64))

    def chosen(values: torch.Tensor) -> torch.Tensor:
        ranks = values.view(20, 9).argsort(1).argsort(1)
        return ranks < 3

    assert (chosen(found.mean) == chosen(exact)).double().mean() >= 0.95
    assert found.forwards <= found.exhaustive / 2 and found.exhaustive == 180 * 32


def test_without_contests_or_when_nothing_is_ever_clear_everything_is_measured(backend):
    setting = tiny.setting("llama", backend, count=4)
    asked = list(single_units(setting.anatomy.of_kind("heads")))
    seen = measure(setting, asked)
    mean, error = score.ratio_mean(seen.differences, seen.counts)
    found = race(setting, asked, [])
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.error, error)
    assert found.forwards == found.exhaustive == seen.forwards and found.open == 0


def test_a_limit_ends_the_race_after_the_round_that_reaches_it(backend):
    setting = tiny.setting("llama", backend, count=8, size=1)
    asked = list(single_units(setting.anatomy.of_kind("heads")))
    contest = Contest(tuple(range(6)), 3)
    for limit, spent in ((Limit(forwards=1), 12), (Limit(deadline=0), 12)):
        found = race(setting, asked, [contest], limit=limit)
        assert found.forwards == spent and found.sequences.tolist() == [2] * 6
        assert found.open == bool(undecided(found.mean, found.error, contest))
