"""The step of a finite difference, measured: first the noise of the function, then how fast it bends.

phi(t) is a loss along one direction, t = 0 where the model is, and t relative to the size of what moves (a gate is 1;
weights move by t times their rms), so that 1 is its natural scale. A difference over a step h is wrong by bias, which
grows with h, and by noise, which grows with 1 / h:

    forward (f(h) - f(0)) / h        h f2 / 2     sqrt(2) sigma / h      least at h = 8^(1/4) sqrt(sigma / f2)
    central (f(h) - f(-h)) / 2h      h^2 f3 / 6   sigma / (sqrt(2) h)    least at h = (3 sigma / f3)^(1/3)

with sigma the noise of one value of phi, f2 = |phi''|, f3 = |phi'''|. sigma comes from a difference table (ECNoise,
More and Wild 2011), f2 from a second difference that stands out of the noise (More and Wild 2012), and where that
fails, and for f3, from a bisection over h until the higher difference is a small multiple of the noise (Shi, Xie, Xuan
and Nocedal 2022).

A search is a generator: it yields the t it wants, is sent phi there, and returns a `Step`. So the searches of many
groups can share their forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

Scheme = Literal["forward", "central"]
Search = Generator[Sequence[float], Sequence[float], "Step"]

LARGEST = 0.25
"""largest relative step: beyond it a gate or a weight is no longer near where it was"""
_POINTS = 7
_FACTOR = 4.0
"""three levels of the difference table that agree within this are noise"""
_TOO_FAR = 0.1
"""a relative change of phi above this is no longer a small step"""
_STANDS_OUT = 100.0
_LOW, _HIGH = 1.5, 6.0
"""the bisection ends when the higher difference is between these multiples of its bound on the noise"""


@dataclass(frozen=True)
class Step:
    """A step and where it came from.

    value: relative, a power of two, so that 1 + value is exact in every dtype that sees it. noise: standard deviation
    of one value of phi. bend: |phi''| (forward) or |phi'''| (central), or the most that noise could hide. error:
    expected RMS error of the difference, in units of the derivative. limit: what decided the value. evaluations: values
    of phi spent.
    """

    value: float
    noise: float
    bend: float
    error: float
    limit: Literal["noise and curvature", "resolution", "non-linearity", "given"]
    evaluations: int


def noise_level(values: Sequence[float]) -> tuple[float | None, Literal["found", "too small", "too large"]]:
    """Standard deviation of the noise in phi at equally spaced points, by ECNoise; and whether the spacing was right.

    sigma_k^2 = (k!)^2 / (2k)! * mean of the squared k-th differences. It is noise when three consecutive k agree within
    a factor 4 and the k-th differences change sign. The number is None where the spacing says nothing.
    """
    first = _differences(values)
    if 2 * sum(d == 0 for d in first) >= len(first):
        return None, "too small"
    if max(values) - min(values) > _TOO_FAR * max(map(abs, values)):
        return None, "too large"
    levels, signs, row, gamma = [], [], list(values), 1.0
    for k in range(1, len(values)):
        row = _differences(row)
        gamma *= k / (2 * (2 * k - 1))
        levels.append(math.sqrt(gamma * sum(d * d for d in row) / len(row)))
        signs.append(min(row) < 0 < max(row))
    for k in range(len(levels) - 2):
        three = levels[k : k + 3]
        if signs[k] and max(three) <= _FACTOR * min(three):
            return sorted(three)[1], "found"
    return min(levels[2:]), "too large"


def optimal(scheme: Scheme, noise: float, bend: float) -> float:
    """The step with the least RMS error; inf for a function that does not bend."""
    if bend == 0:
        return math.inf
    return 8**0.25 * math.sqrt(noise / bend) if scheme == "forward" else math.cbrt(3 * noise / bend)


def expected_error(scheme: Scheme, step: float, noise: float, bend: float) -> float:
    """RMS error of the difference at `step`."""
    if scheme == "forward":
        return math.hypot(step * bend / 2, math.sqrt(2) * noise / step)
    return math.hypot(step**2 * bend / 6, noise / (math.sqrt(2) * step))


def search(scheme: Scheme, resolution: float) -> Search:
    """Measure a step. resolution: the smallest relative step that the dtype of what moves can see."""
    seen: dict[float, float] = {}
    noise = yield from _noise(seen, resolution)
    if scheme == "forward":
        bend = yield from _second_derivative(seen, noise, resolution)
    else:
        bend = yield from _by_bisection(seen, noise, resolution, _third, 3, math.cbrt(3 * noise))
    wanted, limit = optimal(scheme, noise, bend), "noise and curvature"
    step = power_of_two(min(wanted, LARGEST))
    if step < wanted / 2:
        limit = "non-linearity"
    if step < resolution:
        step, limit = power_of_two(resolution, up=True), "resolution"
    while step / 2 >= resolution:
        zero, there = yield from _at(seen, [0.0, step])
        if abs(zero) <= _STANDS_OUT * noise or abs(there - zero) <= _TOO_FAR * max(abs(zero), abs(there)):
            break
        step, limit = step / 2, "non-linearity"
    return Step(step, noise, bend, expected_error(scheme, step, noise, bend), limit, len(seen))


def given(value: float) -> Step:
    """A step fixed by the user, of which nothing was measured."""
    return Step(value, 0.0, 0.0, math.nan, "given", 0)


def run(asking: Search, phi: Callable[[Sequence[float]], Sequence[float]]) -> Step:
    """Carry out one search. phi: relative steps -> losses."""
    try:
        wanted = next(asking)
        while True:
            wanted = asking.send(phi(wanted))
    except StopIteration as done:
        return done.value


def power_of_two(value: float, *, up: bool = False) -> float:
    """The next one below (of a value in (0, inf)): too small a central step costs less than one too large."""
    exponent = math.log2(value)
    return 2.0 ** (math.ceil(exponent) if up else math.floor(exponent))


def _at(seen: dict[float, float], steps: Sequence[float]) -> Generator[Sequence[float], Sequence[float], list[float]]:
    new = [step for step in dict.fromkeys(steps) if step not in seen]
    if new:
        seen.update(zip(new, (yield new), strict=True))
    return [seen[step] for step in steps]


def _noise(seen: dict[float, float], resolution: float) -> Generator[Sequence[float], Sequence[float], float]:
    spacing = power_of_two(max(resolution, min(16 * resolution, LARGEST / 16)), up=True)
    tried: set[float] = set()
    best = None
    while spacing not in tried and len(tried) < 6:
        tried.add(spacing)
        values = yield from _at(seen, [spacing * (i - _POINTS // 2) for i in range(_POINTS)])
        level, status = noise_level(values)
        if status == "found":
            best = level
            break
        if level is not None:
            best = level if best is None else min(best, level)
        away = 128.0 if status == "too small" else 1 / 128
        spacing = min(max(spacing * away, power_of_two(resolution, up=True)), LARGEST / 4)
    floor = 2.0**-53 * max(abs(value) for value in seen.values())
    return max(best or 0.0, floor, 5e-324)


def _second_derivative(
    seen: dict[float, float], noise: float, resolution: float
) -> Generator[Sequence[float], Sequence[float], float]:
    """|phi''| from a second difference that is 100 times the noise while phi changes little; else by bisection."""
    step, before = noise**0.25, None
    for _ in range(2):
        step = power_of_two(min(max(step, 2 * resolution), LARGEST))
        minus, zero, plus = yield from _at(seen, [-step, 0.0, step])
        bend = abs(plus - 2 * zero + minus) / step**2
        far = max(abs(plus - zero), abs(minus - zero)) > _TOO_FAR * max(map(abs, (minus, zero, plus)))
        if bend * step**2 >= _STANDS_OUT * noise and not far:
            return bend
        if before is not None and abs(before - bend) <= bend / 2:
            return bend
        if bend == 0:
            break
        before, step = bend, (noise / bend) ** 0.25
    return (yield from _by_bisection(seen, noise, resolution, _second, 2, 2 * math.sqrt(noise)))


_Points = tuple[tuple[float, float], ...]
_second: _Points = ((4, 1 / 6), (1, -4 / 6), (0, 3 / 6))
"""sum of weight * phi(multiple * h) = h^2 phi'' + O(h^3)"""
_third: _Points = ((3, 1 / 8), (1, -3 / 8), (-1, 3 / 8), (-3, -1 / 8))
"""the same for h^3 phi''' + O(h^5)"""


def _by_bisection(
    seen: dict[float, float], noise: float, resolution: float, points: _Points, order: int, start: float
) -> Generator[Sequence[float], Sequence[float], float]:
    """|derivative| of an order, measured at an h where its difference stands out of the noise but little more: there
    neither noise nor higher derivatives spoil it. Where it does not stand out at the largest step, the most that could
    have gone unseen."""
    # sqrt(3) sigma bounds evenly distributed noise, and a sigma from seven points may be half of the true one
    bound = 2 * math.sqrt(3 * sum(weight**2 for _, weight in points)) * noise
    reach = max(abs(multiple) for multiple, _ in points)
    smallest, largest = power_of_two(resolution, up=True), power_of_two(LARGEST / reach)
    step = power_of_two(min(max(start, smallest), largest))
    low, high = 0.0, math.inf
    while True:
        values = yield from _at(seen, [multiple * step for multiple, _ in points])
        size = abs(sum(weight * value for (_, weight), value in zip(points, values, strict=True)))
        if size < _LOW * bound:
            if step >= largest:
                return _LOW * bound / step**order
            low = step
        elif size > _HIGH * bound and step > smallest and step != 2 * low:
            high = step
        else:
            return size / step**order
        step = 4 * low if high == math.inf else high / 4 if low == 0 else power_of_two(math.sqrt(low * high))
        step = high if step == low else min(max(step, smallest), largest)


def _differences(values: Sequence[float]) -> list[float]:
    return [b - a for a, b in zip(values, values[1:], strict=False)]
