"""Successive elimination: what is decided is right, what is open is probed on."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tinygn_dist.estimate import elimination
from tinygn_dist.estimate.elimination import Choice, Elimination, Limit, Ranking, decided, successive_elimination
from tinygn_dist.estimate.probes import Measured, measure, single_units
from tinygn_dist.maths import confidence


def alike(effects: list[float], noise: float, own: float = 0.0, number: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Units with these effects on sequences that move all of them by up to `noise`, and the middle one of them by up to
    `own` alone; of one token each."""
    wave = torch.tensor([1.0, -1.0] * (number // 2), dtype=torch.float64)
    seen = torch.tensor(effects, dtype=torch.float64)[:, None] + noise * wave
    seen[len(effects) // 2] += own * torch.tensor([1.0, -1.0, -1.0, 1.0] * (number // 4), dtype=torch.float64)
    return seen, torch.ones(number, dtype=torch.float64)


def test_units_are_compared_on_the_same_sequences():
    """Noise a hundred times the effects, but the same for all units: nothing is open."""
    goes, stays = decided(*alike([0.0, 0.1, 0.2, 0.3], noise=10.0), removed=2, total=100)
    assert goes.tolist() == [True, True, False, False] and stays.tolist() == [False, False, True, True]


def test_units_on_both_sides_of_the_boundary_that_noise_leaves_alike_are_open():
    """The standard error of a mean over eight values of +-1 is 1 / sqrt(7) = 0.378; Student's t for six percent to a
    side is 1.76 with seven degrees of freedom; eight of 100 sequences make that sqrt(92 / 100) of it: a unit with noise
    of its own cannot be told from those within 0.64."""
    open_ = [0.0, 0.5, 1.0, 1.5, 3.0]
    for removed, wanted in ((1, []), (2, [1, 2]), (3, [2, 3]), (4, []), (0, []), (5, [])):
        goes, stays = decided(*alike(open_, noise=10.0, own=1.0), removed=removed, total=100)
        assert (~goes & ~stays).nonzero().flatten().tolist() == wanted, removed
        assert not (goes & stays).any() and goes.sum() <= removed


def test_the_error_is_that_of_what_these_sequences_will_say():
    """1.5 standard errors apart, where it takes 1.76: open where eight of very many sequences were seen, decided where
    eight of fifteen were (an error of sqrt(7 / 15) = 0.68 of that), and when all were."""
    pair = alike([0.0, 1.5 / 7**0.5], noise=0.0, own=1.0)
    for total, sure in ((10**6, False), (15, True), (8, True)):
        goes, stays = decided(*pair, removed=1, total=total)
        assert goes.tolist() == [sure, False] and stays.tolist() == [False, sure], total


def test_what_is_decided_stands():
    """Two of four go. Unit 0 is one of them by the first three sequences, unit 3 is not; the other two are alike, and
    seen on all sequences, of which the later ones are easier: their means fall below unit 0's."""
    wave, later = torch.tensor([1.0, -1, 1, 1, -1, 1, -1, 1]) / 10, torch.tensor([0.0] * 3 + [15.0] * 5)
    losses = torch.stack([wave * 0 + 1, 5 + wave - later, 5 - wave - later, wave * 0 + 50]).double()
    choices = [Choice((0, 1, 2, 3), 2)]
    found = replayed(losses, choices)
    assert found.sequences.tolist() == [3, 8, 8, 3] and (found.place < 2).tolist() == [True, False, True, False]
    assert found.mean[0] == 1 and (found.mean[1:3] < -4).all() and found.forwards == 22
    everything = replayed(losses, choices, adaptive=False)
    assert everything.place.tolist() == [2, 1, 0, 3] and everything.forwards == everything.exhaustive == 32


def test_choices_for_several_numbers_settle_the_order(backend):
    """Which one of three would go first, and which two: the last is clear at once, the order of the others on all
    sequences alone (they differ by 0.1 and noise); with one choice for two it is never asked."""
    seen, _ = alike([0.1, 0.0, 50.0], noise=1.0, own=1.0)
    everyone = (0, 1, 2)
    two = replayed(seen, [Choice(everyone, 2)])
    both = replayed(seen, [Choice(everyone, 1), Choice(everyone, 2)])
    assert two.sequences.tolist() == [3, 3, 3] and both.sequences.tolist() == [8, 8, 3]
    assert both.place.tolist() == [1, 0, 2] and (both.open, two.open) == (1, 0)


def test_choices_that_noise_leaves_open_are_counted():
    seen, _ = alike([0.0, 0.1, 5.0], noise=1.0, own=1.0)
    for removed, still in ((1, 1), (2, 0)):
        for adaptive_ in (True, False):
            choices = [Choice((0, 1, 2), removed)]
            found = replayed(seen, choices, adaptive=adaptive_)
            assert found.open == still


def replayed(losses: torch.Tensor, choices: list[Choice], *, adaptive: bool = True) -> Ranking:
    """Probes whose (probes, sequences) losses are known, one sequence to a micro-batch and one token to a sequence."""
    elimination = Elimination(len(losses), [1] * losses.shape[1], choices, adaptive=adaptive, limit=Limit())
    while elimination.wants_more(backend=None):
        some = losses[elimination.active][:, elimination.batches]
        ones = torch.ones(some.shape[1], dtype=torch.float64)
        elimination.add(Measured(some, ones, ones, some.numel()))
    return elimination.ranking()


def test_rounds_grow_by_a_quarter_and_start_with_three_sequences():
    assert elimination._rounds([1] * 8) == [3, 4, 5, 6, 7, 8] and elimination._rounds([1] * 32) == [
        4,
        5,
        6,
        7,
        8,
        10,
        12,
        15,
        18,
        22,
        27,
        32,
    ]
    assert elimination._rounds([4, 4, 4]) == [1, 2, 3] and elimination._rounds([1]) == [1]


@pytest.mark.parametrize("seed", range(5))
def test_it_chooses_like_exhaustive_probing_with_fewer_forwards(seed: int):
    """20 groups of 9 units, 32 sequences, effects spread over two decades and noise like them: at least 95 % of the
    units as all sequences say, for at most half of the forwards."""
    draw = torch.Generator().manual_seed(seed)
    effects = 10 ** (2 * torch.rand(180, 1, generator=draw, dtype=torch.float64) - 2)
    noisy = effects * (1 + 0.7 * torch.randn(180, 32, generator=draw, dtype=torch.float64))
    choices = [Choice(tuple(range(9 * g, 9 * g + 9)), 3) for g in range(20)]
    found = replayed(noisy, choices)
    exact, _ = confidence.ratio_mean(noisy, torch.ones(32, dtype=torch.float64))

    alike_ = (found.place < 3).view(20, 9) == (exact.view(20, 9).argsort(1).argsort(1) < 3)
    assert alike_.double().mean() >= 0.95
    assert found.forwards <= found.exhaustive / 2 and found.exhaustive == 180 * 32


def test_without_choices_or_when_nothing_is_ever_clear_everything_is_measured(backend):
    problem = tiny.problem("llama", backend, count=4)
    asked = list(single_units(problem.anatomy.of_kind("heads")))
    seen = measure(problem, asked)
    mean, error = confidence.ratio_mean(seen.differences, seen.counts)
    found = successive_elimination(problem, asked, [])
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.error, error)
    assert found.forwards == found.exhaustive == seen.forwards and found.open == 0


def test_a_limit_ends_it_after_the_round_that_reaches_it(backend):
    problem = tiny.problem("llama", backend, count=8, size=1)
    asked = list(single_units(problem.anatomy.of_kind("heads")))
    choice = Choice(tuple(range(6)), 3)
    for limit, spent in ((Limit(forwards=1), 18), (Limit(deadline=0), 18)):
        found = successive_elimination(problem, asked, [choice], limit=limit)
        assert found.forwards == spent and found.sequences.tolist() == [3] * 6
