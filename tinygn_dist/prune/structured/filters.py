"""Filters of convolutional nets: how many go, which ones, and the same units taken out of everything that reads them.

Every set of channels that hang together (`channel_graph.py`) is one unit group. By default each loses the same
fraction. With `uneven` whatever the config has a width of its own for (every layer of a VGG, every stage of a ResNet)
may lose another one: blocks of filters go one after the other, the cheapest loss per parameter saved first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import nn

from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.counts import Mix
from tinygn_dist.models.anatomy import Anatomy, UnitGroup
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.prune.structured.removal import RemovedUnits, UnitGoal, UnitPlan
from tinygn_dist.prune.structured.scores import score_units
from tinygn_dist.prune.structured.widths import (
    Removed,
    Slot,
    largest_cut,
    most_even,
    removed_by,
    removed_of,
    slots_by,
    uneven_mix,
)

log = logging.getLogger(__name__)


def slots_of(anatomy: Anatomy) -> list[Slot]:
    """Unit groups that keep the same fraction, because one entry of the config says how many all of them have."""
    entry = anatomy.family.filters.slot
    return slots_by(
        anatomy.of_kind("filters"), lambda group: [entry(piece.tensor) for piece in group.slices if piece.dim == 0]
    )


def params_left(anatomy: Anatomy, removed: Removed) -> int:
    """Parameters of the model without these."""
    shapes = {name: list(shape) for name, shape in anatomy.shapes.items()}
    for group, count in removed.items():
        for piece in group.slices:
            if piece.tensor in shapes:  # not of buffers
                shapes[piece.tensor][piece.dim] -= count * piece.width
    return sum(math.prod(shape) for shape in shapes.values())


class Filters:
    """Filters of convolutional nets. See `UnitMethod`."""

    def dense_params(self, anatomy: Anatomy) -> int:
        """All parameters."""
        return anatomy.total_params

    def plan(self, anatomy: Anatomy, options: PruneConfig, goal: UnitGoal) -> UnitPlan:
        """One mix: the fewest parts of every group, or with `uneven` the most even cut of the slots, that reach the
        sparsity."""
        _check(anatomy, options, goal)
        slots = slots_of(anatomy) if options.uneven else [Slot(anatomy.of_kind("filters"))]
        total = anatomy.total_params
        most = total - round(goal.sparsity * total)
        counts = most_even(slots, options.multiple_of, lambda removed: params_left(anatomy, removed) <= most)
        if counts is None:
            least = params_left(anatomy, largest_cut(slots, options.multiple_of))
            raise UserError(
                f"filters cannot lose {goal.sparsity:.0%} of the {total:,} parameters: {least:,} stay at least; lower "
                f"sparsity or prune.multiple_of ({options.multiple_of})"
            )
        if not options.uneven:
            return UnitPlan((Mix(filters=counts[0]),), goal.protect)
        return UnitPlan((uneven_mix(anatomy, "filters", removed_by(slots, counts)),), goal.protect)

    def remove(self, problem: Problem, plan: UnitPlan, options: PruneConfig) -> RemovedUnits:
        """Choose the filters that go. Nothing is changed in the live model."""
        (mix,), anatomy = plan.mixes, problem.anatomy
        groups = anatomy.of_kind("filters")
        scores = score_units(problem.first(options.probes.samples), mix, options)
        ranked = {group: scores.by_group["filters", group.layer] for group in groups}
        if mix.uneven:
            budget = params_left(anatomy, removed_of(anatomy, "filters", mix))
            removed = by_loss_per_parameter(anatomy, ranked, budget, options.multiple_of)
        else:
            removed = Slot(groups).removed(mix.filters)
        stay = {group: group.num_units - removed[group] for group in groups}
        log.info("filters that stay: %s", ", ".join(f"{stay[group]} of {group.num_units}" for group in groups))
        chosen = {
            group.layer: tuple(sorted(value.argsort(stable=True, descending=True)[: stay[group]].tolist()))
            for group, value in ranked.items()
        }
        return RemovedUnits(KeptUnits((), filters=chosen), scores, notes=tuple(scores.notes))

    def recalibrate_(self, smaller: Problem) -> None:
        """Running means and variances of every BatchNorm, averaged over the calibration batches of all ranks: with
        forward passes only, they make up for the contribution of the removed filters."""
        reestimate_norms(smaller)


def _check(anatomy: Anatomy, options: PruneConfig, goal: UnitGoal) -> None:
    if "filters" not in options.unit_kinds:
        raise UserError(f"{options.pattern} cannot be removed: {anatomy.fixed[options.pattern]}; use --pattern filters")
    if options.counts is not None or goal.protect:
        raise UserError("prune.counts and prune.protect name layers, heads or channels; filters are cut by sparsity")
    if options.criterion in ("obs", "activation"):
        raise UserError(
            f"criterion {options.criterion} does not score filters; use auto, removal, gate, magnitude or random"
        )


def reestimate_norms(problem: Problem) -> None:
    """Running means and variances of every BatchNorm over the calibration batches of all ranks, in place."""
    norms = [
        module for module in problem.bare.modules() if isinstance(module, nn.BatchNorm2d) and module.track_running_stats
    ]
    sums = [torch.zeros(2, norm.num_features, dtype=torch.float64) for norm in norms]
    with torch.no_grad():
        usual = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.momentum = 1.0  # the statistics of each batch alone
        for micro_batch, _ in problem.forwards(problem.losses):
            for total, norm in zip(sums, norms, strict=True) if micro_batch.counts else ():
                total += torch.stack([norm.running_mean, norm.running_var]).double().cpu()
        problem.backend.sum_over_data(sums)
        for total, norm, momentum in zip(sums, norms, usual, strict=True):
            norm.running_mean.copy_(total[0] / len(problem.batches))
            norm.running_var.copy_(total[1] / len(problem.batches))
            norm.momentum = momentum
            norm.eval()


def by_loss_per_parameter(
    anatomy: Anatomy, ranked: Mapping[UnitGroup, torch.Tensor], budget: int, multiple_of: int
) -> dict[UnitGroup, int]:
    """Removed counts with which at most `budget` parameters stay: the slot whose lowest-ranked filters, up to its next
    cut, cost the least loss per parameter saved at the present widths goes, until the budget is met. ranked: (units,)
    losses."""
    slots = slots_of(anatomy)
    cuts, at = [slot.cuts(multiple_of) for slot in slots], [0] * len(slots)
    losses = {
        group: torch.cat([value.new_zeros(1), value.clamp(min=0).sort().values.cumsum(0)])
        for group, value in ranked.items()
    }

    def removed(more: int | None = None) -> dict[UnitGroup, int]:
        """now, or with one slot at its next cut"""
        return removed_by(
            slots, [cut[place + (n == more)] for n, (cut, place) in enumerate(zip(cuts, at, strict=True))]
        )

    def price(number: int) -> tuple[float, int]:
        before, after = removed(), removed(number)
        saved = params_left(anatomy, before) - params_left(anatomy, after)
        lost = [losses[group][after[group]] - losses[group][before[group]] for group in before]
        return float(sum(lost)) / saved, number

    while params_left(anatomy, removed()) > budget:  # which the most even cut meets
        at[min((n for n, cut in enumerate(cuts) if at[n] + 1 < len(cut)), key=price)] += 1
    return removed()
