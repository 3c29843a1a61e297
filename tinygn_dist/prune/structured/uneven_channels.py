"""FFN channels, another number out of each layer: for classes whose config has a width for each layer (Gemma 3n) or
each stack of layers (BART).

Starting from an even cut, each slot (`widths.py`) is tried at a few other widths, everything re-fitted, on sequences
that nothing was fitted on; the widths with the least sum of losses under the budget are then exact (a knapsack). The
sum is right only near the point where it was measured, so a few points on the way there are tried, the even cut among
them, and the best is taken.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.counts import Mix, between
from tinygn_dist.maths.solve.knapsack import cheapest
from tinygn_dist.models.anatomy import Anatomy, UnitGroup
from tinygn_dist.prune.structured.layers_heads_channels import hold_out
from tinygn_dist.prune.structured.probing import Prober
from tinygn_dist.prune.structured.removal import RemovedUnits, Trial, UnitGoal, UnitPlan
from tinygn_dist.prune.structured.scores import score_units
from tinygn_dist.prune.structured.trials import RefitPlan, Trials
from tinygn_dist.prune.structured.widths import (
    Slot,
    largest_cut,
    most_even,
    removed_by,
    removed_of,
    slots_by,
    uneven_mix,
)
from tinygn_dist.runtime.progress import Progress

log = logging.getLogger(__name__)
_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""of the widths that a slot can have, those that are measured"""
_WAY = (0.5, 1.0)
"""from the even cut to the one with the least sum"""
_BUDGET_ENDED = (
    "the budget of probes ended before every layer was tried at other widths: every layer keeps the same share"
)


def slots_of(anatomy: Anatomy, protect: Sequence[int] = ()) -> list[Slot]:
    """Those of which no layer is protected."""

    def width_of(group: UnitGroup) -> list[int]:
        if anatomy.family.feed_forwards[0].uneven == "stacks":
            return [next(i for i, stack in enumerate(anatomy.stacks) if group.layer in stack.layers)]
        return [group.layer]

    slots = slots_by(anatomy.of_kind("channels"), width_of)
    return [slot for slot in slots if not {group.layer for group in slot.groups} & set(protect)]


class UnevenChannels:
    """FFN channels, another number out of each layer. See `UnitMethod`."""

    def dense_params(self, anatomy: Anatomy) -> int:
        """The parameters of the layers."""
        return sum(anatomy.layer_params)

    def plan(self, anatomy: Anatomy, options: PruneConfig, goal: UnitGoal) -> UnitPlan:
        """One mix: the most even cut that reaches the sparsity of the layers' parameters."""
        _check(anatomy, options, goal)
        slots, params = slots_of(anatomy, goal.protect), anatomy.of_kind("channels")[0].unit_params
        total = -(-round(goal.sparsity * self.dense_params(anatomy)) // params)
        counts = most_even(slots, options.multiple_of, lambda removed: sum(removed.values()) >= total)
        if counts is None:
            most = sum(largest_cut(slots, options.multiple_of).values()) * params
            raise UserError(
                f"channels cannot remove {goal.sparsity:.0%} of the layers' {self.dense_params(anatomy):,} "
                f"parameters: at most {most:,} of them are in channels that may go; lower sparsity or "
                f"prune.multiple_of ({options.multiple_of})"
            )
        return UnitPlan((uneven_mix(anatomy, "channels", removed_by(slots, counts)),), goal.protect)

    def remove(self, problem: Problem, plan: UnitPlan, options: PruneConfig) -> RemovedUnits:
        """The best of the even cut and of a few towards the widths that cost least, re-fitted on all sequences."""
        (even,), anatomy = plan.mixes, problem.anatomy
        slots = slots_of(anatomy, plan.protect)
        most = uneven_mix(anatomy, "channels", largest_cut(slots, options.multiple_of))
        fitted, held_out = hold_out(problem)
        refit = RefitPlan(problem, most, {}, options.compensate)
        moments = refit.moments(fitted)
        probed, whole = problem.first(options.probes.samples), Mix(channels=most.channels)
        scores = score_units(probed, whole, options, moments and moments.inputs)
        trials = Trials(held_out, most, options, scores, refit.jobs(moments))
        cuts = [slot.cuts(options.multiple_of) for slot in slots]
        costs = _costs(trials, Prober(scores, held_out, options.probes), even, slots, cuts)
        candidates = [even, *(_on_the_way(anatomy, slots, even, costs) if costs else [])]
        best = min(candidates, key=trials.record_loss) if costs else even
        log.info("channels that go from each layer: %s", ", ".join(map(str, best.uneven)))
        kept, shifts = trials.commit(best, problem, anew=True)
        tried = tuple(Trial(mix, loss) for mix, loss in trials.losses.items())
        notes = () if costs else (_BUDGET_ENDED,)
        return RemovedUnits(kept, scores, tried, shifts, (*scores.notes, *notes, *trials.notes))

    def recalibrate_(self, smaller: Problem) -> None:
        """Nothing."""


def _check(anatomy: Anatomy, options: PruneConfig, goal: UnitGoal) -> None:
    ffn = next(iter(anatomy.family.feed_forwards), None)
    if ffn is not None and ffn.uneven and options.pattern != "channels":
        raise UserError(
            f"prune.uneven: pattern {options.pattern} cuts all layers alike; use --pattern channels, or leave it out"
        )
    if ffn is None or not ffn.uneven:
        raise UserError(
            f"prune.uneven: {anatomy.model_class} builds its layers with one width that its config names, so they "
            "cannot differ; leave it out (pattern layers takes out whole ones), or mask weights with --pattern "
            "unstructured"
        )
    if options.counts is not None:
        raise UserError(
            "prune.counts says how many channels go from each layer, prune.uneven lets layers differ; use sparsity"
        )
    goal.check_protect(anatomy)
    if not anatomy.of_kind("channels"):
        raise UserError(
            f"channels cannot be removed: those of every layer of this {anatomy.model_class} depend on each other; "
            "mask weights with --pattern unstructured"
        )


def _costs(
    trials: Trials, prober: Prober, even: Mix, slots: Sequence[Slot], cuts: Sequence[Sequence[int]]
) -> list[dict[int, float]]:
    """For every slot: by how many of its channels go, the loss added to that of the even cut: measured at a few cuts,
    on the line in between. Nothing where the budget of probes ends before."""
    few, anatomy = prober.problem.first(prober.options.samples), prober.problem.anatomy
    quiet = replace(few, progress=Progress(shown=False))  # one bar is enough
    now, costs = removed_of(anatomy, "channels", even), []

    def loss(mix: Mix) -> float:
        prober.count(len(few.batches))
        totals, counts = trials.losses_of(mix, prober.scores, quiet)
        return float(totals.sum() / counts.sum())

    base = loss(even)
    with few.progress.bar("trying widths", len(slots)) as advance:
        for slot, cut in zip(slots, cuts, strict=True):
            current, added = now[slot.groups[0]], {}
            for count in sorted({current, *(cut[round(level * (len(cut) - 1))] for level in _LEVELS)}):
                if prober.exhausted:
                    return []
                other = uneven_mix(anatomy, "channels", now | slot.removed(count))
                added[count] = 0.0 if count == current else loss(other) - base
            rising = dict(zip(added, itertools.accumulate(added.values(), max), strict=True))
            costs.append({count * len(slot.groups): between(rising, count) for count in cut})
            advance()
    return costs


def _on_the_way(
    anatomy: Anatomy, slots: Sequence[Slot], even: Mix, costs: Sequence[Mapping[int, float]]
) -> Iterator[Mix]:
    """As many channels in all as in the even cut: the widths with the least sum of costs, and those between the two."""
    now = removed_of(anatomy, "channels", even)
    total, current = sum(even.uneven), [sum(now[group] for group in slot.groups) for slot in slots]
    least = cheapest(costs, total)
    for fraction in _WAY:
        middle = [a + fraction * (b - a) for a, b in zip(current, least, strict=True)]
        off = [{n: (n - m) ** 2 for n in cost} for cost, m in zip(costs, middle, strict=True)]
        counts = [n // len(slot.groups) for n, slot in zip(cheapest(off, total), slots, strict=True)]
        yield uneven_mix(anatomy, "channels", removed_by(slots, counts))
