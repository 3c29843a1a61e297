"""The search over mixes against the best of all, on losses with a known minimum."""

from __future__ import annotations

import pytest

from tinygn_dist.maths.counts import Mix
from tinygn_dist.prune.structured.mix_search import search

CANDIDATES = [Mix(layers, heads, 8 * (20 - 2 * layers - 3 * heads)) for heads in range(3) for layers in range(8)]


def bowl(layers: float, heads: float):
    return lambda mix: (mix.layers - layers) ** 2 + 10 * (mix.heads - heads) ** 2


@pytest.mark.parametrize("layers", range(8))
@pytest.mark.parametrize("heads", range(3))
def test_the_best_of_all_is_found_where_losses_fall_and_rise_once(layers: int, heads: int):
    losses: dict[Mix, float] = {}
    best, untried = search(CANDIDATES, bowl(layers, heads), 99, losses)
    assert (best.layers, best.heads) == (layers, heads)
    assert set(losses) | set(untried) == set(CANDIDATES) and not set(losses) & set(untried)


def test_few_are_tried_and_each_once():
    """Three layers, one head: 0 to 5 layers up to two rises; 3, then two to each side; one more head is no better after
    the same five."""
    seen: list[Mix] = []
    loss = bowl(3, 1)
    search(CANDIDATES, lambda mix: seen.append(mix) or loss(mix), 99)
    assert [mix.layers for mix in seen if mix.heads == 0] == [0, 1, 2, 3, 4, 5]
    assert [mix.layers for mix in seen if mix.heads == 1] == [3, 4, 5, 2, 1]
    assert [mix.layers for mix in seen if mix.heads == 2] == [3, 4, 5, 2, 1]
    assert len(seen) == len(set(seen)) == 16


@pytest.mark.parametrize("most", [1, 2, 7, 9])
def test_no_more_than_allowed_and_the_best_of_those(most: int):
    losses: dict[Mix, float] = {}
    best, untried = search(CANDIDATES, bowl(3, 1), most, losses)
    assert len(losses) == most and losses[best] == min(losses.values())
    assert len(untried) == len(CANDIDATES) - most


@pytest.mark.parametrize("edge", [Mix(0, 0, 256), Mix(3, 0, 0), Mix(0, 2, 0)])
def test_one_kind_alone_is_never_missed(edge: Mix):
    """Mixes as they are for a tenth of SmolLM2-135M's layers, whatever the losses between those of one kind: three
    whole layers remove exactly a tenth, one or two more than that, for the channels are rounded up."""
    some = [Mix(0, 0, 256), Mix(1, 0, 192), Mix(2, 0, 128), Mix(3, 0, 0), Mix(0, 1, 64), Mix(1, 1, 64), Mix(0, 2, 0)]
    best, _ = search(some, lambda mix: 1.0 if mix == edge else 2.0 + mix.layers + mix.heads, 12)
    assert best == edge


def test_one_rise_is_noise():
    """A bump at one layer does not hide the minimum behind it."""
    best, _ = search(CANDIDATES[:8], lambda mix: 5.0 if mix.layers == 1 else 4.0 - mix.layers, 99)
    assert best.layers == 7


def test_what_is_known_is_not_tried_again():
    known = {CANDIDATES[0]: 100.0}
    best, _ = search(CANDIDATES[:2], lambda mix: 1.0 if mix == CANDIDATES[1] else pytest.fail("tried again"), 1, known)
    assert best == CANDIDATES[1]
