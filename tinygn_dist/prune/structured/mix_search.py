"""Which of several mixes is best, by trying few of them. Pure.

Mixes of one kind alone come first, so a mix of several is never worse, on what they are tried on, than what one kind
alone would be. They lie at the edges, where a walk may not arrive: counts are rounded to what hardware likes, so some
mixes remove more than was asked for, and between those that do not there are rises. Between the edges the loss is
smooth in the number of layers that go: they go in the order of what they cost, and the fewer channels go for each. So
for every number of heads the search begins where the last one ended and walks up and down from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple

from tinygn_dist.maths.counts import Mix

_RISES = 2
"""in a row that end a walk: one may be noise"""


def search(
    candidates: Sequence[Mix], loss_of: Callable[[Mix], float], most: int, known: dict[Mix, float] | None = None
) -> tuple[Mix, list[Mix]]:
    """The best of the mixes tried, at most `most` of them, and those that were not tried, in order.

    known: losses of mixes that were tried before; the new ones are added. First each kind alone. Then, for each number
    of heads, from few on: more layers until the loss has risen twice in a row (then fewer, likewise), from the best
    number of layers so far; no more heads once they are no better than fewer.
    """
    measured: dict[Mix, float] = {} if known is None else known
    left = most

    def tried(mix: Mix) -> float | None:
        nonlocal left
        if mix not in measured and left == 0:
            return None
        if mix not in measured:
            left -= 1
            measured[mix] = loss_of(mix)
        return measured[mix]

    for mix in sorted(mix for mix in candidates if sum(map(bool, astuple(mix))) == 1):
        tried(mix)
    best: Mix | None = None
    for heads in sorted({mix.heads for mix in candidates}):
        level = sorted(mix for mix in candidates if mix.heads == heads)
        here = _walk(level, tried, best.layers if best else 0)
        if here is None or best is not None and measured[here] > measured[best]:
            break
        best = here
    best = min(measured.keys() & set(candidates), key=lambda mix: (measured[mix], mix))
    return best, sorted(set(candidates) - set(measured))


def _walk(level: Sequence[Mix], tried: Callable[[Mix], float | None], layers: int) -> Mix | None:
    """The best mix of one number of heads; None where no trial was left."""
    start = min(range(len(level)), key=lambda place: abs(level[place].layers - layers))
    losses: dict[int, float] = {}
    for way in (1, -1):
        place, last, rises = start, float("inf"), 0
        while 0 <= place < len(level) and rises < _RISES:
            loss = tried(level[place])
            if loss is None:
                break
            losses[place] = loss
            rises, last = (rises + 1 if loss > last else 0), loss
            place += way
    return level[min(losses, key=lambda place: (losses[place], place))] if losses else None
