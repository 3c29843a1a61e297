"""Heads and channels of one mix zeroed in the live weights, the columns that stay re-fitted, and what removed layers gave taken
over.

Least squares to the dense outputs over the calibration tokens. Where the weight has a bias it is part of the fit: the
moments are taken about their means, and what the means of removed units gave goes into the bias. A unit that is constant
then costs nothing. Of a feed-forward that layers behind it leave alone, what they added to the residual stream is part of the
outputs (`takeover`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tinygn_dist.backends.pieces import Edited, Job
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.estimate.unit_moments import UnitMoments, taken_by
from tinygn_dist.maths.counts import Mix
from tinygn_dist.maths.solve import least_squares
from tinygn_dist.models.anatomy import Matrix, UnitGroup
from tinygn_dist.models.kept import INNER_KINDS, KeptUnits
from tinygn_dist.prune.structured.absorb import Takers, segments_gone
from tinygn_dist.prune.structured.probing import UnitScores


def with_bias(problem: Problem, matrices: Sequence[Matrix], options: PruneConfig) -> frozenset[str]:
    """Names of the matrices whose bias takes part in the fit."""
    if not options.compensate:
        return frozenset()
    return frozenset(
        t.name for t in matrices if getattr(problem.bare.get_submodule(t.module), "bias", None) is not None
    )


def fit_jobs(
    problem: Problem, moments: UnitMoments, groups: Sequence[UnitGroup], biased: frozenset[str], takers: Takers
) -> list[Job]:
    """One job per weight that reads a group's units: it, the Gram matrix of its inputs, and what the layers gave that it may have
    to take over. A collective."""
    jobs = []
    for group in groups:
        for module, width in group.readers:
            matrix, segments = problem.anatomy.matrix_of(module), takers.get(group, ())
            sums = [moments.inputs.moments.pop(moments.inputs.of(matrix))]
            sums += [moments.taken.pop(taken_by(matrix.name, segment)) for segment in segments]
            cost = matrix.shape[1] ** 3 + matrix.shape[0] * matrix.shape[1] ** 2
            told = {"group": group, "width": width, "biased": matrix.name in biased, "behind": segments, "orders": {}}
            jobs.append(Job((matrix,), sums, cost, told))
    problem.backend.sum_for_jobs(jobs)
    return jobs


def apply_mix(
    problem: Problem,
    mix: Mix,
    most: Mix,
    scores: UnitScores,
    jobs: Sequence[Job],
    options: PruneConfig,
) -> tuple[KeptUnits, dict[str, torch.Tensor]]:
    """What stays, and what biases gain. most: of every kind the largest number in any mix of the same jobs."""
    gone = set(scores.layer_order[: mix.layers])
    widths = dict(zip(problem.anatomy.of_kind("channels"), mix.uneven, strict=True)) if mix.uneven else {}
    for job in jobs:
        stays, group = job.matrices[0].layer not in gone, job.extra["group"]
        job.extra["removed"] = widths.get(group, getattr(mix, group.kind)) if stays else 0
        job.extra["run"] = segments_gone(job.extra["behind"], gone) if stays else 0

    def solve(job: Job, weights: list[torch.Tensor]) -> list[Edited]:
        return [_solve_columns(job, weights[0], most, scores, options)]

    edits = problem.backend.map_matrices(problem.model, jobs, solve)
    kept: dict[str, dict[int, tuple[int, ...]]] = {kind: {} for kind in INNER_KINDS}
    shifts = {}
    for job in jobs:
        group, matrix = job.extra["group"], job.matrices[0]
        if matrix.layer not in gone:
            if getattr(most, group.kind):
                kept[group.kind][group.layer] = tuple(edits[matrix.name]["units"].tolist())
            if "shift" in edits[matrix.name]:
                shifts[f"{matrix.module}.bias"] = edits[matrix.name]["shift"].cpu()
    for group in problem.anatomy.of_kind("experts"):
        if mix.experts and group.layer not in gone:
            order = scores.by_group["experts", group.layer].argsort(stable=True)
            kept["experts"][group.layer] = tuple(sorted(order[mix.experts :].tolist()))
    layers = tuple(layer for layer in range(problem.anatomy.num_layers) if layer not in gone)
    return KeptUnits(layers, **kept), shifts


class _Fit(NamedTuple):
    """Of one job, about the means where its weight has a bias. gram: (in, in) fp32. taken: (out, in) fp32 of what it takes over.
    mean, gain: (in,) and (out,) fp64 means of inputs and of what it takes over. None: no bias; nothing to take over."""

    gram: torch.Tensor
    mean: torch.Tensor | None
    taken: torch.Tensor | None
    gain: torch.Tensor | None


def _fit_of(job: Job) -> _Fit:
    moment, run = job.moments[0], job.moments[1 : 1 + job.extra["run"]]
    taken = torch.stack(run).sum(0) if run else None
    if not job.extra["biased"]:
        return _Fit(moment.float(), None, None if taken is None else taken.float(), None)
    gram, mean = _about_mean(moment)
    if taken is None:
        return _Fit(gram, mean, None, None)
    gain = taken[:, -1] / moment[-1, -1].clamp(min=torch.finfo(torch.float32).tiny)
    return _Fit(gram, mean, (taken[:, :-1] - torch.outer(taken[:, -1], mean)).float(), gain)


def _solve_columns(job: Job, weight: torch.Tensor, most: Mix, scores: UnitScores, options: PruneConfig) -> Edited:
    """The new weight. Extras: the units that stay, int64, and the gain of the bias, fp32, where it takes part."""
    group, removed = job.extra["group"], job.extra["removed"]
    if removed == 0 and job.extra["run"] == 0:
        return Edited(weight.clone(), {"units": torch.arange(group.num_units)})
    fit = _fit_of(job)
    keep_unit = torch.ones(group.num_units, dtype=torch.bool, device=weight.device)
    if removed:
        keep_unit[_order(job, weight, fit, most, scores, options)[:removed]] = False
    units = keep_unit.nonzero().squeeze(1)
    columns = least_squares.unit_columns(units, job.extra["width"])
    fitted = torch.zeros_like(weight)
    if options.compensate:
        solved = least_squares.refit(weight, fit.gram, columns, options.damping, fit.taken)
        fitted[:, columns] = solved.to(weight.dtype)
    else:
        fitted[:, columns] = weight[:, columns]
    extras = {"units": units}
    if fit.mean is not None:
        shift = (weight - fitted).double() @ fit.mean + (0 if fit.gain is None else fit.gain)
        extras["shift"] = shift.float()
    return Edited(fitted, extras)


def _order(
    job: Job, weight: torch.Tensor, fit: _Fit, most: Mix, scores: UnitScores, options: PruneConfig
) -> torch.Tensor:
    """Units in the order they go, `removed` of them at least."""
    group = job.extra["group"]
    ranked = scores.by_group.get((group.kind, group.layer))
    if ranked is not None:
        return ranked.argsort(stable=True)
    # nested, so it serves every mix that leaves as much to take over; the first call sees the dense weight
    orders, run = job.extra["orders"], job.extra["run"]
    if len(orders.get(run, ())) < job.extra["removed"]:
        wanted = max(job.extra["removed"], min(getattr(most, group.kind), group.num_units - group.least))
        if fit.taken is not None:
            every = torch.arange(weight.shape[1], device=weight.device)
            weight = least_squares.refit(weight, fit.gram, every, options.damping, fit.taken)
        orders[run] = least_squares.elimination_order(
            weight, fit.gram, group.num_units, wanted, damping=options.damping
        )
    return orders[run]


def _about_mean(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp32 Gram matrix about the mean and the fp64 mean, from an fp64 moment whose last input is always 1."""
    total = moment[-1, -1].clamp(min=torch.finfo(torch.float32).tiny)
    mean = moment[:-1, -1] / total
    return (moment[:-1, :-1] - total * torch.outer(mean, mean)).float(), mean
