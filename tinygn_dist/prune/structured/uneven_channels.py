"""FFN channels, out of every layer as many as cost least: for classes whose config has a width for each layer (Gemma 3n) or each
stack of layers (BART).

A *slot* is the layers that must keep one width. Starting from an even cut, each slot is tried at a few other widths, everything
re-fitted, on sequences that nothing was fitted on; the widths with the least sum of losses under the budget are then exact
(a knapsack). The sum is right only near where it was measured, so the way there is tried at a few points, the even cut among
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
from tinygn_dist.maths.counts import Mix, between, channel_cuts, evenly
from tinygn_dist.maths.solve.knapsack import cheapest
from tinygn_dist.models.anatomy import Anatomy
from tinygn_dist.prune.structured.layers_heads_channels import apart
from tinygn_dist.prune.structured.probing import Removals
from tinygn_dist.prune.structured.removal import RemovedUnits, Trial, UnitGoal, UnitPlan
from tinygn_dist.prune.structured.scores import score_units
from tinygn_dist.prune.structured.trials import Fits, Trials
from tinygn_dist.runtime.progress import Progress

log = logging.getLogger(__name__)
_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""of the widths that a slot can have, those that are measured"""
_WAY = (0.5, 1.0)
"""from the even cut to the one with the least sum"""
_BUDGET_ENDED = (
    "the budget of probes ended before every layer was tried at other widths: every layer keeps the same share"
)
Slot = tuple[int, ...]
"""groups of channels, by their place in `Anatomy.of_kind("channels")`, that must keep one width"""


def slots_of(anatomy: Anatomy, protect: Sequence[int] = ()) -> list[Slot]:
    """Those of which no layer is protected."""
    slots: dict[int, list[int]] = {}
    for place, group in enumerate(anatomy.of_kind("channels")):
        by_stack = anatomy.family.feed_forwards[0].uneven == "stacks"
        key = next(i for i, s in enumerate(anatomy.stacks) if group.layer in s.layers) if by_stack else group.layer
        slots.setdefault(key, []).append(place)
    layers = [group.layer for group in anatomy.of_kind("channels")]
    return [tuple(slot) for slot in slots.values() if not {layers[place] for place in slot} & set(protect)]


class UnevenChannels:
    """FFN channels, another number out of each layer. See `UnitMethod`."""

    def dense_params(self, anatomy: Anatomy) -> int:
        """The parameters of the layers."""
        return sum(anatomy.layer_params)

    def plan(self, anatomy: Anatomy, options: PruneConfig, goal: UnitGoal) -> UnitPlan:
        """One mix: the most even cut that reaches the sparsity of the layers' parameters."""
        return UnitPlan((_even_cut(anatomy, options, goal),), goal.protect)

    def remove(self, problem: Problem, plan: UnitPlan, options: PruneConfig) -> RemovedUnits:
        """The best of the even cut and of a few towards the widths that cost least, re-fitted on all sequences."""
        (even,), anatomy = plan.mixes, problem.anatomy
        slots = slots_of(anatomy, plan.protect)
        cuts = _cuts(anatomy, slots, options)
        most = _mix(anatomy, slots, [cut[-1] for cut in cuts])
        fitted, held_out = apart(problem)
        fits = Fits(problem, most, {}, options)
        moments = fits.moments(fitted)
        whole = Mix(channels=most.channels)
        scores = score_units(problem.first(options.probe_samples), whole, options, moments and moments.inputs)
        trials = Trials(held_out, most, options, scores, fits.jobs(moments))
        costs = _costs(trials, Removals(scores, held_out, options), even, slots, cuts)
        candidates = [even, *(_on_the_way(anatomy, slots, even, costs) if costs else [])]
        best = min(candidates, key=trials.told_loss_of) if costs else even
        log.info("channels that go from each layer: %s", ", ".join(map(str, best.uneven)))
        kept, shifts = trials.leave(best, problem, anew=True)
        tried = tuple(Trial(mix, loss) for mix, loss in trials.losses.items())
        notes = [] if costs else [_BUDGET_ENDED]
        return RemovedUnits(kept, scores, tried, shifts, (*notes, *trials.notes))

    def recalibrate_(self, smaller: Problem) -> None:
        """Nothing."""


def _even_cut(anatomy: Anatomy, options: PruneConfig, goal: UnitGoal) -> Mix:
    ffn = next(iter(anatomy.family.feed_forwards), None)
    if ffn is not None and ffn.uneven and options.pattern != "channels":
        raise UserError(
            f"prune.uneven: pattern {options.pattern} cuts all layers alike; use --pattern channels, or leave it out"
        )
    if ffn is None or not ffn.uneven:
        raise UserError(
            f"prune.uneven: {anatomy.model_class} builds its layers with one width that its config names, so they cannot differ; "
            "leave it out (pattern layers takes out whole ones), or mask weights with --pattern unstructured"
        )
    if options.counts is not None:
        raise UserError(
            "prune.counts says how many channels go from each layer, prune.uneven lets layers differ; use sparsity"
        )
    bad = [layer for layer in goal.protect if not 0 <= layer < anatomy.num_layers]
    if bad:
        raise UserError(f"prune.protect names layer {bad[0]}, the model has layers 0 to {anatomy.num_layers - 1}")
    groups, slots = anatomy.of_kind("channels"), slots_of(anatomy, goal.protect)
    if not groups:
        raise UserError(
            f"channels cannot be removed: those of every layer of this {anatomy.model_class} depend on each other; mask weights "
            "with --pattern unstructured"
        )
    total = -(-round(goal.sparsity * sum(anatomy.layer_params)) // groups[0].unit_params)
    cuts = _cuts(anatomy, slots, options)

    def removed(gone: Sequence[int]) -> int:
        return sum(count * len(slot) for count, slot in zip(gone, slots, strict=True))

    gone = evenly([groups[slot[0]].num_units for slot in slots], cuts, lambda gone: removed(gone) >= total)
    if gone is None:
        most = removed([cut[-1] for cut in cuts]) * groups[0].unit_params
        raise UserError(
            f"channels cannot remove {goal.sparsity:.0%} of the layers' {sum(anatomy.layer_params):,} parameters: at most "
            f"{most:,} of them are in channels that may go; lower sparsity or prune.multiple_of ({options.multiple_of})"
        )
    return _mix(anatomy, slots, gone)


def _cuts(anatomy: Anatomy, slots: Sequence[Slot], options: PruneConfig) -> list[list[int]]:
    """Of every slot, how many channels of each of its layers may go."""
    groups = anatomy.of_kind("channels")
    return [[0, *channel_cuts(groups[slot[0]].num_units, options.multiple_of)] for slot in slots]


def _costs(
    trials: Trials, removals: Removals, even: Mix, slots: Sequence[Slot], cuts: Sequence[Sequence[int]]
) -> list[dict[int, float]]:
    """Of every slot, by how many of its channels go, what that adds to the loss of the even cut: measured at a few cuts, on the
    line in between. Nothing where the budget of probes ends before."""
    few, costs = removals.problem.first(removals.options.probe_samples), []
    quiet = replace(few, progress=Progress(shown=False))  # one bar is enough

    def loss(mix: Mix) -> float:
        removals.spend(len(few.batches))
        totals, counts = trials.losses_of(mix, removals.scores, quiet)
        return float(totals.sum() / counts.sum())

    base = loss(even)
    with few.progress.bar("trying widths", len(slots)) as advance:
        for slot, cut in zip(slots, cuts, strict=True):
            here, seen = even.uneven[slot[0]], {}
            for count in sorted({here, *(cut[round(level * (len(cut) - 1))] for level in _LEVELS)}):
                if removals.spent:
                    return []
                seen[count] = 0.0 if count == here else loss(_with(even, slot, count)) - base
            rising = dict(zip(seen, itertools.accumulate(seen.values(), max), strict=True))
            costs.append({count * len(slot): between(rising, count) for count in cut})
            advance()
    return costs


def _on_the_way(
    anatomy: Anatomy, slots: Sequence[Slot], even: Mix, costs: Sequence[Mapping[int, float]]
) -> Iterator[Mix]:
    """As many channels in all as in the even cut: the widths with the least sum of costs, and those between the two."""
    total, here = sum(even.uneven), [even.uneven[slot[0]] * len(slot) for slot in slots]
    least = cheapest(costs, total)
    for share in _WAY:
        middle = [a + share * (b - a) for a, b in zip(here, least, strict=True)]
        off = [{n: (n - m) ** 2 for n in cost} for cost, m in zip(costs, middle, strict=True)]
        counts = cheapest(off, total)
        yield _mix(anatomy, slots, [n // len(slot) for n, slot in zip(counts, slots, strict=True)])


def _mix(anatomy: Anatomy, slots: Sequence[Slot], counts: Sequence[int]) -> Mix:
    """So many channels of every layer of each slot, none of the others."""
    mix = Mix(uneven=(0,) * len(anatomy.of_kind("channels")))
    for slot, count in zip(slots, counts, strict=True):
        mix = _with(mix, slot, count)
    return mix


def _with(mix: Mix, slot: Slot, count: int) -> Mix:
    widths = tuple(count if place in slot else width for place, width in enumerate(mix.uneven))
    return Mix(channels=max(widths), uneven=widths)
