"""Heads and channels of one mix zeroed in the live weights, and the columns that stay re-fitted.

Least squares to the dense outputs over the calibration tokens. Where the weight has a bias it is part of the fit: the
moments are taken about their means, and what the means of removed units gave goes into the bias. A unit that is constant
then costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tinygn_dist.anatomy import Target, UnitGroup
from tinygn_dist.backends.pieces import Job
from tinygn_dist.budget import Mix
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.activations import InputMoments
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.kept import INNER_KINDS, KeptUnits
from tinygn_dist.removal import UnitScores
from tinygn_dist.solve import least_squares


def with_bias(setting: Setting, targets: Sequence[Target], options: PruneConfig) -> frozenset[str]:
    """Names of the targets whose bias takes part in the fit. Where others have none, the report says so."""
    if not options.compensate:
        return frozenset()
    biased = [t for t in targets if getattr(setting.bare.get_submodule(t.module), "bias", None) is not None]
    without = sorted(_leaves(targets) - _leaves(biased))
    if without:
        setting.notes.append(f"no bias takes up the mean of what removed units gave {', '.join(without)}: it has none")
    return frozenset(target.name for target in biased)


def _leaves(targets: Sequence[Target]) -> set[str]:
    """The last names of their modules, such as o_proj."""
    return {target.module.rpartition(".")[2] for target in targets}


def fit_jobs(setting: Setting, moments: InputMoments, groups: Sequence[UnitGroup], biased: frozenset[str]) -> list[Job]:
    """One job per weight that reads a group's units: it, and the Gram matrix of its inputs. A collective."""
    jobs = []
    for group in groups:
        for module, width in group.readers:
            target = setting.anatomy.target_of(module)
            gram = moments.moments.pop(moments.of(target))
            cost = target.shape[1] ** 3 + target.shape[0] * target.shape[1] ** 2
            jobs.append(Job((target,), [gram], cost, {"group": group, "width": width, "biased": target.name in biased}))
    setting.backend.sum_for_jobs(jobs)
    return jobs


def apply_mix(
    setting: Setting,
    mix: Mix,
    most: Mix,
    scores: UnitScores,
    jobs: Sequence[Job],
    options: PruneConfig,
) -> tuple[KeptUnits, dict[str, torch.Tensor]]:
    """What stays, and what biases gain. most: of every kind the largest number in any mix of the same jobs."""
    gone = set(scores.layer_order[: mix.layers])
    for job in jobs:
        job.extra["removed"] = 0 if job.targets[0].layer in gone else getattr(mix, job.extra["group"].kind)

    def solve(job: Job, weights: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [_solve_columns(job, weights[0], most, scores, options)]

    setting.backend.map_targets(setting.model, jobs, solve)
    kept: dict[str, dict[int, tuple[int, ...]]] = {kind: {} for kind in INNER_KINDS}
    shifts = {}
    for job in jobs:
        (units, shift), group, target = job.outcome, job.extra["group"], job.targets[0]
        if target.layer not in gone:
            kept[group.kind][group.layer] = units
            if shift is not None:
                shifts[f"{target.module}.bias"] = shift
    for group in setting.anatomy.of_kind("experts"):
        if mix.experts and group.layer not in gone:
            order = scores.by_group["experts", group.layer].argsort(stable=True)
            kept["experts"][group.layer] = tuple(sorted(order[mix.experts :].tolist()))
    layers = tuple(layer for layer in range(setting.anatomy.num_layers) if layer not in gone)
    return KeptUnits(layers, **kept), shifts


def _solve_columns(
    job: Job, weight: torch.Tensor, most: Mix, scores: UnitScores, options: PruneConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """New weight and keep mask; leaves the units that stay, and the gain of the bias, as the job's outcome."""
    group, removed = job.extra["group"], job.extra["removed"]
    job.outcome = tuple(range(group.num_units)), None
    if removed == 0:
        return weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    gram, mean = _about_mean(job.moments[0]) if job.extra["biased"] else (job.moments[0].float(), None)
    ranked = scores.by_group.get((group.kind, group.layer))
    if ranked is not None:
        order = ranked.argsort(stable=True)
    else:  # the order is nested, so it serves every mix; the first call sees the dense weight
        if len(job.extra.get("order", ())) < removed:
            wanted = max(removed, getattr(most, group.kind))
            job.extra["order"] = least_squares.elimination_order(
                weight, gram, group.num_units, wanted, damping=options.damping
            )
        order = job.extra["order"]
    keep_unit = torch.ones(group.num_units, dtype=torch.bool, device=weight.device)
    keep_unit[order[:removed]] = False
    units = keep_unit.nonzero().squeeze(1)
    columns = least_squares.unit_columns(units, job.extra["width"])
    fitted = torch.zeros_like(weight)
    if options.compensate:
        fitted[:, columns] = least_squares.refit(weight, gram, columns, options.damping).to(weight.dtype)
    else:
        fitted[:, columns] = weight[:, columns]
    keep = torch.zeros_like(weight, dtype=torch.bool)
    keep[:, columns] = True
    job.outcome = tuple(units.tolist()), None if mean is None else ((weight - fitted).double() @ mean).float().cpu()
    return fitted, keep


def _about_mean(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp32 Gram matrix about the mean and the fp64 mean, from an fp64 moment whose last input is always 1."""
    total = moment[-1, -1].clamp(min=torch.finfo(torch.float32).tiny)
    mean = moment[:-1, -1] / total
    return (moment[:-1, :-1] - total * torch.outer(mean, mean)).float(), mean
