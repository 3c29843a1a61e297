"""Filters of convolutional nets: how many go, which ones, and the same units taken out of everything that reads them.

Every set of channels that hang together (`dependencies.py`) is one unit group. By default each loses the same share, so that
stock classes with one width per stage load the result; where the config has a width for every layer, `uneven` lets the
layers differ: blocks of filters go one after the other, the cheapest loss per parameter saved first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from tinygn_dist.anatomy import Anatomy, UnitGroup
from tinygn_dist.budget import Mix
from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.kept import KeptUnits, Removal
from tinygn_dist.unit_scores import score_units

log = logging.getLogger(__name__)


def parts(anatomy: Anatomy) -> int:
    """How many equal parts every unit group can be cut into: the greatest common divisor of their sizes."""
    return math.gcd(*(group.num_units for group in anatomy.of_kind("filters")))


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


def plan_mixes(anatomy: Anatomy, options: PruneConfig) -> list[Mix]:
    """One mix: the fewest parts of every group that reach the sparsity of all parameters. UserError, before weights
    load, when none does."""
    if "filters" not in options.unit_kinds:
        raise UserError(f"{options.pattern} cannot be removed: {anatomy.fixed[options.pattern]}; use --pattern filters")
    if options.counts is not None or options.protect:
        raise UserError("prune.counts and prune.protect name layers, heads or channels; filters are cut by sparsity")
    if options.uneven and not anatomy.family.filters.uneven:
        raise UserError(
            f"prune.uneven: the config of {anatomy.model_class} has one width per stage, so its layers cannot differ; leave "
            "it out"
        )
    if options.criterion in ("obs", "activation"):
        raise UserError(
            f"criterion {options.criterion} does not score filters; use auto, removal, gate, magnitude or random"
        )
    total, whole = anatomy.total_params, parts(anatomy)
    step = 1 if options.uneven else min(options.multiple_of, max(1, whole // 2))
    for gone in range(0, whole, step):
        if total - params_left(anatomy, _even(anatomy, gone)) >= round(options.sparsity * total):
            return [Mix(filters=gone)]
    raise UserError(
        f"filters cannot lose {options.sparsity:.0%} of the {total:,} parameters: every group of filters is cut into "
        f"{whole // step} equal parts, of which one stays; lower sparsity or prune.multiple_of ({options.multiple_of})"
    )


def dense_params(anatomy: Anatomy) -> int:
    """What a sparsity is a share of."""
    return anatomy.total_params


def remove_units(setting: Setting, candidates: Sequence[Mix], options: PruneConfig) -> Removal:
    """Choose the filters that go. Nothing is changed in the live model: `shrink` takes them out, and `reestimate_norms`
    makes up for them."""
    (mix,), anatomy = candidates, setting.anatomy
    scores = score_units(setting.first(options.probe_samples), mix, options, None)
    ranked = {group.layer: scores.by_group["filters", group.layer] for group in anatomy.of_kind("filters")}
    kept = _even(anatomy, mix.filters)
    if options.uneven:
        kept = _by_loss_per_parameter(anatomy, ranked, params_left(anatomy, kept), options.multiple_of)
    log.info(
        "filters that stay: %s", ", ".join(f"{kept[g.layer]} of {g.num_units}" for g in anatomy.of_kind("filters"))
    )
    chosen = {
        index: tuple(sorted(value.argsort(stable=True, descending=True)[: kept[index]].tolist()))
        for index, value in ranked.items()
    }
    return Removal(KeptUnits((), filters=chosen), scores, [], {})


def reestimate_norms(setting: Setting) -> None:
    """Running means and variances of every BatchNorm of a smaller net, averaged over the calibration batches of all ranks:
    the closed-form compensation, with forward passes only, of what the removed filters contributed. In place."""
    norms = [
        module for module in setting.bare.modules() if isinstance(module, nn.BatchNorm2d) and module.track_running_stats
    ]
    mine = setting.backend.share(setting.batches)
    sums = [torch.zeros(2, norm.num_features, dtype=torch.float64) for norm in norms]
    with torch.no_grad():
        usual = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.momentum = 1.0  # the statistics of each batch alone
        for batch, real in mine:
            setting.objective(setting.model, setting.on_device(batch))
            for total, norm in zip(sums, norms, strict=True) if real else ():
                total += torch.stack([norm.running_mean, norm.running_var]).double().cpu()
        setting.backend.sum_over_data(sums)
        for total, norm, momentum in zip(sums, norms, usual, strict=True):
            norm.running_mean.copy_(total[0] / len(setting.batches))
            norm.running_var.copy_(total[1] / len(setting.batches))
            norm.momentum = momentum
            norm.eval()


def _even(anatomy: Anatomy, gone: int) -> dict[int, int]:
    whole = parts(anatomy)
    return {group.layer: group.num_units // whole * (whole - gone) for group in anatomy.of_kind("filters")}


def _by_loss_per_parameter(
    anatomy: Anatomy, ranked: Mapping[int, torch.Tensor], budget: int, multiple_of: int
) -> dict[int, int]:
    """Kept counts, multiples of `multiple_of`, with which at most `budget` parameters stay: the block of lowest-ranked
    filters with the least loss per parameter it saves at the present widths goes, until the budget is met."""
    groups: dict[int, UnitGroup] = {group.layer: group for group in anatomy.of_kind("filters")}
    kept = {index: group.num_units for index, group in groups.items()}
    losses = {index: value.clamp(min=0).sort().values.cumsum(0) for index, value in ranked.items()}
    left = params_left(anatomy, kept)

    def price(index: int) -> float:
        goes, gone = _block(kept[index], multiple_of), groups[index].num_units - kept[index]
        before = float(losses[index][gone - 1]) if gone else 0.0
        saved = left - params_left(anatomy, kept | {index: kept[index] - goes})
        return (float(losses[index][gone + goes - 1]) - before) / saved

    while left > budget:
        open_groups = [index for index in groups if kept[index] > multiple_of]
        if not open_groups:
            raise UserError(f"filters cannot go below {left:,} parameters at prune.multiple_of {multiple_of}; lower it")
        cheapest = min(open_groups, key=lambda index: (price(index), index))
        kept[cheapest] -= _block(kept[cheapest], multiple_of)
        left = params_left(anatomy, kept)
    return kept


def _block(kept: int, multiple_of: int) -> int:
    """Filters to take from `kept` to come to a lower multiple."""
    return kept % multiple_of or multiple_of
