"""Filters of convolutional nets: how many go, which ones, and the same units taken out of everything that reads them.

Every set of channels that hang together (`dependencies.py`) is one unit group. By default each loses the same share. With `uneven`
what the config has a width of its own for (every layer of a VGG, every stage of a ResNet) may lose another one: blocks of filters go
one after the other, the cheapest loss per parameter saved first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.counts import Mix, channel_cuts, evenly
from tinygn_dist.models.anatomy import Anatomy, UnitGroup
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.prune.structured.removal import RemovedUnits, UnitGoal, UnitPlan
from tinygn_dist.prune.structured.scores import score_units

log = logging.getLogger(__name__)


def parts(groups: Iterable[UnitGroup]) -> int:
    """How many equal parts each of these can be cut into: the greatest common divisor of their sizes."""
    return math.gcd(*(group.num_units for group in groups))


def slots_of(anatomy: Anatomy) -> list[list[UnitGroup]]:
    """Unit groups that keep the same share, because one entry of the config says how many all of them have."""
    slots: list[tuple[set[str], list[UnitGroup]]] = []
    for group in anatomy.of_kind("filters"):
        names = {anatomy.family.filters.slot(piece.tensor) for piece in group.slices if piece.dim == 0}
        same = [slot for slot in slots if slot[0] & names]
        merged = names.union(*(slot[0] for slot in same)), [*(g for slot in same for g in slot[1]), group]
        slots = [slot for slot in slots if slot not in same] + [merged]
    return [groups for _, groups in slots]


def params_left(anatomy: Anatomy, kept: Mapping[int, int]) -> int:
    """Parameters of the model when group i keeps kept[i] units (all of them where it is not named)."""
    shapes = {name: list(shape) for name, shape in anatomy.shapes.items()}
    for group in anatomy.of_kind("filters"):
        for piece in group.slices:
            if piece.tensor in shapes:  # not of buffers
                shapes[piece.tensor][piece.dim] -= (
                    group.num_units - kept.get(group.layer, group.num_units)
                ) * piece.width
    return sum(math.prod(shape) for shape in shapes.values())


class Filters:
    """Filters of convolutional nets. See `UnitMethod`."""

    def dense_params(self, anatomy: Anatomy) -> int:
        """All parameters."""
        return anatomy.total_params

    def plan(self, anatomy: Anatomy, options: PruneConfig, goal: UnitGoal) -> UnitPlan:
        """One mix: the fewest parts of every group, or with `uneven` the most even cut of the slots, that reach the sparsity."""
        return UnitPlan((_mix(anatomy, options, goal),), goal.protect)

    def remove(self, problem: Problem, plan: UnitPlan, options: PruneConfig) -> RemovedUnits:
        """Choose the filters that go. Nothing is changed in the live model."""
        (mix,), anatomy = plan.mixes, problem.anatomy
        scores = score_units(problem.first(options.probe_samples), mix, options, None)
        ranked = {group.layer: scores.by_group["filters", group.layer] for group in anatomy.of_kind("filters")}
        if mix.uneven:
            groups = anatomy.of_kind("filters")
            even = {group.layer: group.num_units - n for group, n in zip(groups, mix.uneven, strict=True)}
            kept = _by_loss_per_parameter(anatomy, ranked, params_left(anatomy, even), options)
        else:
            kept = _kept([anatomy.of_kind("filters")], [mix.filters])
        log.info(
            "filters that stay: %s", ", ".join(f"{kept[g.layer]} of {g.num_units}" for g in anatomy.of_kind("filters"))
        )
        chosen = {
            index: tuple(sorted(value.argsort(stable=True, descending=True)[: kept[index]].tolist()))
            for index, value in ranked.items()
        }
        return RemovedUnits(KeptUnits((), filters=chosen), scores)

    def recalibrate_(self, smaller: Problem) -> None:
        """Running means and variances of every BatchNorm, averaged over the calibration batches of all ranks: with forward
        passes only, they make up for what the removed filters contributed."""
        reestimate_norms(smaller)


def _mix(anatomy: Anatomy, options: PruneConfig, goal: UnitGoal) -> Mix:
    if "filters" not in options.unit_kinds:
        raise UserError(f"{options.pattern} cannot be removed: {anatomy.fixed[options.pattern]}; use --pattern filters")
    if options.counts is not None or goal.protect:
        raise UserError("prune.counts and prune.protect name layers, heads or channels; filters are cut by sparsity")
    if options.criterion in ("obs", "activation"):
        raise UserError(
            f"criterion {options.criterion} does not score filters; use auto, removal, gate, magnitude or random"
        )
    total, slots = anatomy.total_params, slots_of(anatomy) if options.uneven else [anatomy.of_kind("filters")]
    most = total - round(goal.sparsity * total)
    cuts = _cuts(slots, options)
    gone = evenly([parts(s) for s in slots], cuts, lambda gone: params_left(anatomy, _kept(slots, gone)) <= most)
    if gone is not None and not options.uneven:
        return Mix(filters=gone[0])
    if gone is not None:
        each = [g.num_units - _kept(slots, gone)[g.layer] for g in anatomy.of_kind("filters")]
        return Mix(filters=max(each), uneven=tuple(each))
    raise UserError(
        f"filters cannot lose {goal.sparsity:.0%} of the {total:,} parameters: "
        f"{params_left(anatomy, _kept(slots, [cut[-1] for cut in cuts])):,} stay at least; lower sparsity or prune.multiple_of "
        f"({options.multiple_of})"
    )


def reestimate_norms(problem: Problem) -> None:
    """Running means and variances of every BatchNorm of a smaller net, averaged over the calibration batches of all ranks:
    the closed-form compensation, with forward passes only, of what the removed filters contributed. In place."""
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


def _cuts(slots: Sequence[Sequence[UnitGroup]], options: PruneConfig) -> list[list[int]]:
    """Of every slot, how many of its parts may go."""
    return [[0, *channel_cuts(parts(groups), options.multiple_of)] for groups in slots]


def _kept(slots: Sequence[Sequence[UnitGroup]], gone: Sequence[int]) -> dict[int, int]:
    """Units that each group keeps when so many parts of its slot go."""
    return {
        group.layer: group.num_units // parts(groups) * (parts(groups) - count)
        for groups, count in zip(slots, gone, strict=True)
        for group in groups
    }


def _by_loss_per_parameter(
    anatomy: Anatomy, ranked: Mapping[int, torch.Tensor], budget: int, options: PruneConfig
) -> dict[int, int]:
    """Kept counts with which at most `budget` parameters stay: the slot whose lowest-ranked filters, up to its next cut, cost the
    least loss per parameter saved at the present widths goes, until the budget is met."""
    slots = slots_of(anatomy)
    cuts, at = _cuts(slots, options), [0] * len(slots)
    losses = {
        index: torch.cat([value.new_zeros(1), value.clamp(min=0).sort().values.cumsum(0)])
        for index, value in ranked.items()
    }

    def kept(more: int | None = None) -> dict[int, int]:
        """now, or with one slot at its next cut"""
        return _kept(slots, [cut[place + (n == more)] for n, (cut, place) in enumerate(zip(cuts, at, strict=True))])

    def price(number: int) -> tuple[float, int]:
        before, after = kept(), kept(number)
        saved = params_left(anatomy, before) - params_left(anatomy, after)
        lost = [losses[i][len(ranked[i]) - after[i]] - losses[i][len(ranked[i]) - before[i]] for i in before]
        return float(sum(lost)) / saved, number

    while params_left(anatomy, kept()) > budget:  # which the most even cut meets
        at[min((n for n, cut in enumerate(cuts) if at[n] + 1 < len(cut)), key=price)] += 1
    return kept()
