"""Schedules: pure functions of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinygn_dist.errors import UserError


def warmup_linear(step: int, total: int, warmup: float = 0.1) -> float:
    """Factor on the learning rate: linear from 0 over the first `warmup` of the steps, then linear to 0 at the end.

    step counts from 0; the first step already learns.
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return (total - step) / max(1, total - rise)


def sparsity_between(kind: str, first: float, final: float, part: float) -> float:
    """Sparsity after `part` (0 to 1) of the updates, from `first` to `final`.

    linear: equal amounts of weights; cubic: most of them early, when the model still has room (Zhu and Gupta 2017);
    iterative: the same share of what is left each time.
    """
    if part >= 1:
        return final
    match kind:
        case "linear":
            return first + (final - first) * part
        case "cubic":
            return final + (first - final) * (1 - part) ** 3
        case "iterative":
            return 1 - (1 - first) * ((1 - final) / (1 - first)) ** part
    raise AssertionError(kind)


def swapped_share(share: float, step: int, last: int, decays: bool) -> float:
    """Share of the kept weights that an update swaps: RigL's cosine from `share` at step 0 to 0 at the last update
    (Evci et al. 2020), or always `share` (SET)."""
    return share / 2 * (1 + math.cos(math.pi * step / last)) if decays else share


@dataclass(frozen=True)
class Plan:
    """When the sparsity changes. total: optimizer steps of the training. updates: numbers of steps after which masks
    change, ascending. levels: the sparsity from the start on, then after each update. restarts: the learning rate's
    cycle begins anew after every update that changes the sparsity."""

    total: int
    updates: tuple[int, ...] = ()
    levels: tuple[float, ...] = ()
    restarts: bool = False

    def level_after(self, steps: int) -> float:
        """The sparsity that holds once `steps` steps are done and their update was made."""
        return self.levels[sum(update <= steps for update in self.updates)]

    def rounds(self) -> list[range]:
        """The steps between two updates, in order."""
        edges = [0, *self.updates, self.total]
        return [range(low, high) for low, high in zip(edges[:-1], edges[1:], strict=True)]

    def learning_rate(self, step: int) -> float:
        """Factor on the peak learning rate of the step (from 0)."""
        if not self.restarts:
            return warmup_linear(step, self.total)
        cycle = next(steps for steps in self.rounds() if step in steps)
        return warmup_linear(step - cycle.start, len(cycle))


@dataclass(frozen=True)
class Growth:
    """How the sparsity grows in a training.

    kind: one-shot, linear, cubic, iterative, or late (dense until the last update). every: optimizer steps from one
    update to the next. first: sparsity of the first masks, by default half of the final one. freeze: last share of the
    training without an update. swaps: masks change at constant sparsity too (kind one-shot). rounds: every update
    begins a new round of training.
    """

    kind: str
    every: int
    first: float | None = None
    freeze: float = 0.0
    swaps: bool = False
    rounds: bool = False


def make_plan(growth: Growth, total: int, final: float) -> Plan:
    """The plan of a training of `total` optimizer steps that ends at the sparsity `final`.

    Raises UserError when no update fits."""
    kind = growth.kind
    if kind == "one-shot" and not growth.swaps:
        return Plan(total, (), (final,))
    count = int((1 - growth.freeze) * total) // growth.every
    if count == 0:
        raise UserError(
            f"schedule.every {growth.every} leaves no update in the first {1 - growth.freeze:.0%} of {total} optimizer "
            "steps; use a smaller one, or more steps"
        )
    updates = tuple(growth.every * (number + 1) for number in range(count))
    if kind == "one-shot":
        return Plan(total, updates, (final,) * (count + 1))
    if kind == "late":
        return Plan(total, updates, (*(0.0,) * count, final))
    start = final / 2 if growth.first is None else min(growth.first, final)
    levels = (start, *(sparsity_between(kind, start, final, (number + 1) / count) for number in range(count)))
    return Plan(total, updates, levels, restarts=growth.rounds or kind == "iterative")
