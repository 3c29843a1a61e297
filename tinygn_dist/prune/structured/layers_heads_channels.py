"""Unit patterns: score layers, heads (KV groups), FFN channels and experts, choose what goes, re-fit what stays.

Probes decide between layers, heads and experts, in units of loss. Inside one FFN the layer's own output error decides
(every layer keeps the same width, so that stock classes load). Where several kinds may go, candidate mixes are tried
on the live model, measured, and undone to the last bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from dataclasses import replace

from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.counts import Mix, UnitSizes, largest_of, mixes
from tinygn_dist.maths.unit_kinds import MIXED_KINDS, UNIT_KINDS
from tinygn_dist.models.anatomy import Anatomy
from tinygn_dist.prune.structured.absorb import absorbers_of
from tinygn_dist.prune.structured.layer_order import LayerOrder
from tinygn_dist.prune.structured.removal import RemovedUnits, Replan, Trial, UnitGoal, UnitPlan
from tinygn_dist.prune.structured.scores import UnitScorer, reads_moments
from tinygn_dist.prune.structured.trials import RefitPlan, Trials

log = logging.getLogger(__name__)
_ROUTED = "{} stay, as many as the router chooses for each token"
_PROBE_TOKENS = 512
"""of which removal ranks the layers of SmolLM2-135M with a correlation of 0.93 with held-out losses, and heads with
0.82, where two halves of what was held out agree with 0.98 and 0.83 (docs/results.md)"""
_HELD_OUT = 32
"""of SmolLM2-135M's layers the seventh to go was another one on eight sequences, which left 13 % more perplexity than
what other eight chose (docs/results.md)"""
_IN_LAYERS = tuple(kind for kind in MIXED_KINDS if UNIT_KINDS[kind].per_layer)
_MOST_LOOKS = 4
"""at mixes of which each was the best by the times of the ones before"""


def unit_sizes(anatomy: Anatomy, kinds: Collection[str] = ()) -> UnitSizes:
    """Counts and parameters per unit. UserError when layers differ in one of these kinds, which an even cut cannot
    express."""
    facts: dict[str, tuple[int, int]] = {}
    for kind in _IN_LAYERS:
        by_count = len(anatomy.stacks) > 1 and kind == "heads"
        seen = {(group.num_units, 0 if by_count else group.unit_params) for group in anatomy.of_kind(kind)}
        if len(seen) > 1 or kind == "channels" and _some_stay(anatomy):
            if kind in kinds:
                raise UserError(
                    f"layers have different numbers of {kind} that may go, which cannot be cut evenly; use "
                    + ("--pattern channels with --prune.uneven true" if _may_differ(anatomy) else "--pattern layers")
                )
            seen = set()
        facts[kind] = seen.pop() if seen else (0, 0)
    inner = [number for kind in _IN_LAYERS for number in facts[kind]]
    experts, heads = anatomy.of_kind("experts"), anatomy.of_kind("heads")
    counts = heads[0].counts if heads else ()
    if len(anatomy.stacks) > 1 or not experts and "layers" in anatomy.fixed:
        return UnitSizes(anatomy.num_layers, 0, *inner, head_counts=counts, uneven_params=sum(anatomy.layer_params))
    if not experts:
        return UnitSizes(anatomy.num_layers, max(anatomy.layer_params), *inner, head_counts=counts)
    sparse = {group.layer for group in experts}
    dense = [params for layer, params in enumerate(anatomy.layer_params) if layer not in sparse]
    sparse_params = anatomy.layer_params[experts[0].layer]
    return UnitSizes(
        anatomy.num_layers, sparse_params, *inner, experts[0].least, len(dense), max(dense, default=0), counts
    )


def _may_differ(anatomy: Anatomy) -> bool:
    """Whether its config has a width for each layer or stack."""
    return any(ffn.uneven for ffn in anatomy.family.feed_forwards)


def _some_stay(anatomy: Anatomy) -> bool:
    """Whether layers keep all their channels, whatever goes."""
    return _may_differ(anatomy) and len(anatomy.of_kind("channels")) < anatomy.num_layers


class LayersHeadsChannels:
    """The same number of heads, channels and experts out of every layer that stays, so that stock classes load. See
    `UnitMethod`."""

    def dense_params(self, anatomy: Anatomy) -> int:
        """The parameters of the layers."""
        return unit_sizes(anatomy).total_params

    def plan(self, anatomy: Anatomy, options: PruneConfig, goal: UnitGoal) -> UnitPlan:
        """The mixes that reach the goal, of the layers' parameters or of a measured latency."""
        return UnitPlan(tuple(_mixes(anatomy, options, goal)), goal.protect)

    def remove(self, problem: Problem, plan: UnitPlan, options: PruneConfig) -> RemovedUnits:
        """Choose the units and zero them in the live model, with the rest re-fitted (layers and experts are only named:
        no value of their weights is the same as their absence). Where there is a choice of mixes, they are compared on
        sequences that they were not fitted on, and the best is fitted on all: heads and channels to what the shorter
        model gives."""
        most, anatomy, samples = largest_of(plan.mixes), problem.anatomy, options.probes.samples
        several = len(plan.mixes) > 1
        probed = problem.first(_enough_to_rank(problem, samples) if several else samples)
        fitted, held_out = hold_out(problem)
        order = LayerOrder(probed, fitted, held_out, options, plan.protect)
        scores = order.score(most.layers)
        anew = several or plan.replan is not None
        removals = [scores.layer_order[:count] for count in range(most.layers + 1)]
        absorbers = absorbers_of(anatomy, removals if anew else removals[-1:]) if options.compensate else {}
        trials = Trials(held_out.first(samples), most, options, scores)
        refit, moments = RefitPlan(problem, most, absorbers, options.compensate), None
        if anew or not trials.in_two_steps(most) or reads_moments(anatomy, most, options):
            moments = refit.moments(fitted if anew else problem)
        UnitScorer(probed, options, scores, moments and moments.inputs).score(replace(most, layers=0))
        trials.jobs = refit.jobs(moments)
        best = trials.best_of(plan.mixes)
        if plan.replan is not None:
            best = _closer(trials, best, most, plan.replan)
        kept, shifts = trials.commit(best, problem, anew=anew)
        tried = tuple(Trial(mix, loss) for mix, loss in trials.losses.items())
        return RemovedUnits(kept, scores, tried, shifts, (*scores.notes, *trials.notes))

    def recalibrate_(self, smaller: Problem) -> None:
        """Nothing."""


def _mixes(anatomy: Anatomy, options: PruneConfig, goal: UnitGoal) -> list[Mix]:
    kinds, sizes = options.unit_kinds, unit_sizes(anatomy, options.unit_kinds)
    counted = options.counts is not None and len(anatomy.stacks) > 1
    if options.pattern in anatomy.fixed and not (
        counted and (options.pattern == "layers" or anatomy.of_kind(options.pattern))
    ):
        others = [kind for kind in reversed(UNIT_KINDS) if kind not in anatomy.fixed]
        raise UserError(
            f"{options.pattern} cannot be removed: {anatomy.fixed[options.pattern]}; use --pattern "
            f"{' or '.join(others)}"
        )
    goal.check_protect(anatomy)
    if goal.protect and kinds != ("layers",):
        raise UserError("prune.protect keeps whole layers; other units are cut evenly in all, so use --pattern layers")
    if options.counts is not None:
        return [_fixed_mix(sizes, options, anatomy.num_layers - len(anatomy.lasting) if counted else 0)]
    found = list(mixes(sizes, goal.sparsity, kinds, options.multiple_of, goal.latency))
    found = [mix for mix in found if mix.layers <= anatomy.num_layers - max(1, len(goal.protect))]
    if not found and goal.latency:
        raise UserError(
            f"{options.pattern} cannot reach {options.goal}: of {goal.latency.total_seconds:.3g} s measured, "
            f"{goal.latency.rest / goal.latency.total_seconds:.0%} lie outside the layers ({_described(sizes)}); ask "
            "for more"
        )
    if not found:
        raise UserError(
            f"{options.pattern} cannot remove {goal.sparsity:.0%} of the layers' {sizes.total_params:,} parameters "
            f"({_described(sizes)}); lower sparsity or use --pattern units"
        )
    return found


def _fixed_mix(sizes: UnitSizes, options: PruneConfig, most_layers: int) -> Mix:
    """most_layers: how many layers of several stacks may go, which no budget removes, as it removes no heads of
    them."""
    mix = Mix(**options.counts)
    for kind in MIXED_KINDS:
        there, asked = sizes.count(kind), mix[kind]
        by_count = {"layers": most_layers, "heads": sizes.heads - 1 if most_layers else 0}
        most = max(sizes.most(kind), by_count.get(kind, 0))
        if asked and (kind not in options.unit_kinds or asked > most):
            raise UserError(
                f"prune.counts asks {asked} {kind} to go, the model has {there} (per layer) of which "
                f"{_ROUTED.format(sizes.least_experts) if kind == 'experts' else 'one stays'}, and pattern "
                f"{options.pattern} removes {', '.join(options.unit_kinds)}"
            )
    if not sizes.accepts(mix):
        raise UserError(
            f"prune.counts leaves {sizes.heads - mix.heads} KV groups of {sizes.heads}, accepted: "
            f"{', '.join(map(str, sizes.head_counts))} (the model's config checks the number of heads against its "
            "hidden size)"
        )
    return mix


def _described(sizes: UnitSizes) -> str:
    described = (
        f"layers {sizes.layers}, KV groups {sizes.heads}, channels {sizes.channels} per layer, at least one of each "
        "stays"
    )
    if sizes.experts:
        described += f"; of {sizes.experts} experts {_ROUTED.format(sizes.least_experts)}"
    return described


def hold_out(problem: Problem) -> tuple[Problem, Problem]:
    """The sequences that layers and mixes are fitted on, and a quarter (one micro-batch at least, _HELD_OUT at most)
    that they are compared on: on those of the fit the kind with more weights to fit looks better than it is. One
    micro-batch serves for both."""
    if len(problem.batches) < 2:
        return problem, problem
    return problem.split(min(_HELD_OUT, problem.num_sequences // 4))


def _closer(trials: Trials, best: Mix, most: Mix, replan: Replan) -> Mix:
    """Has the best mix timed until it is the best by its own time too, `_MOST_LOOKS` times at most: the last may then
    be one that only the corrected table speaks for. most: of every kind the largest number in any mix that the jobs
    serve."""
    for _ in range(_MOST_LOOKS):
        others = [mix for mix in replan(best) if set(mix.kinds) <= set(most.kinds)]
        if not others or best in others:
            break
        best = trials.best_of(others)
    return best


def _enough_to_rank(problem: Problem, samples: int) -> int:
    """As many sequences as make _PROBE_TOKENS: probing every head on all of them takes longer than trying every mix."""
    tokens = problem.batches[0].get("input_ids")
    return samples if tokens is None else min(samples, math.ceil(_PROBE_TOKENS / tokens.shape[1]))
