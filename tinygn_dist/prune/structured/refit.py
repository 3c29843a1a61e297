"""Heads and channels of one mix zeroed in the live weights, the columns that stay re-fitted, and removed layers
absorbed.

Least squares to the dense outputs over the calibration tokens. Where the weight has a bias it is part of the fit: the
moments are taken about their means, and the mean of what is removed goes into the bias, so a constant unit costs
nothing. Of a feed-forward that absorbs layers behind it, their addition to the residual stream is part of the outputs
(`absorb.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from tinygn_dist.backends.pieces import Edited, Job
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.estimate.unit_moments import UnitMoments, absorbed_by
from tinygn_dist.maths.counts import Mix
from tinygn_dist.maths.solve import least_squares
from tinygn_dist.maths.unit_kinds import INNER_KINDS
from tinygn_dist.models.anatomy import Matrix, UnitGroup
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.prune.structured.absorb import Absorbers, Segments, segments_removed
from tinygn_dist.prune.structured.probing import UnitScores


@dataclass(frozen=True)
class RefitOptions:
    """How weights are fitted. compensate: False leaves the columns that stay as they are. damping: fraction of the mean
    of the Gram matrix's diagonal. most: of every kind the largest number in any mix that is tried on the same jobs."""

    compensate: bool
    damping: float
    most: Mix


@dataclass(kw_only=True)
class RefitJob(Job):
    """A weight that reads the units of `group`, `width` inputs for each. moments: the Gram matrix of its inputs, then
    for each of the segments behind it the product of the segment's output and these inputs. biased: whether its bias is
    part of the fit.

    orders: in what order units go, by how many segments are absorbed. It is nested, so it serves every mix that absorbs
    as many; the first call sees the dense weight.
    """

    group: UnitGroup
    width: int
    biased: bool
    segments: Segments
    orders: dict[int, torch.Tensor] = field(default_factory=dict)


class _Share(NamedTuple):
    """What a mix asks of one weight: so many units go, and so many segments are absorbed."""

    removed: int
    absorbed: int


def with_bias(problem: Problem, matrices: Sequence[Matrix]) -> frozenset[str]:
    """Names of the matrices that have a bias, which then takes part in the fit."""
    return frozenset(
        t.name for t in matrices if getattr(problem.bare.get_submodule(t.module), "bias", None) is not None
    )


def fit_jobs(
    problem: Problem,
    moments: UnitMoments,
    groups: Sequence[UnitGroup],
    biased: frozenset[str],
    absorbers: Absorbers,
) -> list[RefitJob]:
    """One job per weight that reads a group's units. Takes the moments. A collective."""
    jobs = []
    for group in groups:
        for module, width in group.readers:
            matrix, segments = problem.anatomy.matrix_of(module), absorbers.get(group, ())
            sums = [moments.inputs.moments.pop(moments.inputs.of(matrix))]
            sums += [moments.absorbed.pop(absorbed_by(matrix.name, segment)) for segment in segments]
            cost = matrix.shape[1] ** 3 + matrix.shape[0] * matrix.shape[1] ** 2
            row = dict(group=group, width=width, biased=matrix.name in biased, segments=segments)
            jobs.append(RefitJob(matrices=(matrix,), moments=sums, cost=cost, **row))
    problem.backend.sum_for_jobs(jobs)
    return jobs


def apply_mix(
    problem: Problem, mix: Mix, scores: UnitScores, jobs: Sequence[RefitJob], options: RefitOptions
) -> tuple[KeptUnits, dict[str, torch.Tensor]]:
    """Fits and zeroes the live weights; returns the units that stay, and what biases gain, (out,) fp32 by name."""
    removed = set(scores.layer_order[: mix.layers])
    widths = dict(zip(problem.anatomy.of_kind("channels"), mix.uneven, strict=True)) if mix.uneven else {}

    def solve(job: RefitJob, weights: list[torch.Tensor]) -> list[Edited]:
        share = _Share(0, 0)
        if job.matrices[0].layer not in removed:
            count = widths.get(job.group, mix[job.group.kind])
            share = _Share(count, segments_removed(job.segments, removed))
        return [_solve_columns(job, share, weights[0], scores, options)]

    edits = problem.backend.map_matrices(problem.model, jobs, solve)
    kept: dict[str, dict[int, tuple[int, ...]]] = {kind: {} for kind in INNER_KINDS}
    shifts = {}
    for job in jobs:
        group, matrix = job.group, job.matrices[0]
        if matrix.layer not in removed:
            if options.most[group.kind]:
                kept[group.kind][group.layer] = tuple(edits[matrix.name]["units"].tolist())
            if "shift" in edits[matrix.name]:
                shifts[f"{matrix.module}.bias"] = edits[matrix.name]["shift"].cpu()
    for group in problem.anatomy.of_kind("experts"):
        if mix.experts and group.layer not in removed:
            order = scores.by_group["experts", group.layer].argsort(stable=True)
            kept["experts"][group.layer] = tuple(sorted(order[mix.experts :].tolist()))
    layers = tuple(layer for layer in range(problem.anatomy.num_layers) if layer not in removed)
    return KeptUnits(layers, **kept), shifts


class _Sums(NamedTuple):
    """Of one job, about the means where its weight has a bias. gram: (in, in) fp32. absorbed: (out, in) fp32 of the
    layers it absorbs. mean, gain: (in,) and (out,) fp64 means of its inputs and of the output of these layers. None: no
    bias; nothing to absorb."""

    gram: torch.Tensor
    mean: torch.Tensor | None
    absorbed: torch.Tensor | None
    gain: torch.Tensor | None


def _sums_of(job: RefitJob, segments: int) -> _Sums:
    moment, products = job.moments[0], job.moments[1 : 1 + segments]
    absorbed = torch.stack(products).sum(0) if products else None
    if not job.biased:
        return _Sums(moment.float(), None, None if absorbed is None else absorbed.float(), None)
    gram, mean = _about_mean(moment)
    if absorbed is None:
        return _Sums(gram, mean, None, None)
    gain = absorbed[:, -1] / moment[-1, -1].clamp(min=torch.finfo(torch.float32).tiny)
    return _Sums(gram, mean, (absorbed[:, :-1] - torch.outer(absorbed[:, -1], mean)).float(), gain)


def _solve_columns(
    job: RefitJob, share: _Share, weight: torch.Tensor, scores: UnitScores, options: RefitOptions
) -> Edited:
    """The new weight. Extras: the units that stay, int64, and the gain of the bias, fp32, where it takes part."""
    if share == _Share(0, 0):
        return Edited(weight.clone(), {"units": torch.arange(job.group.num_units)})
    sums = _sums_of(job, share.absorbed)
    keep_unit = torch.ones(job.group.num_units, dtype=torch.bool, device=weight.device)
    if share.removed:
        ranked = scores.by_group.get((job.group.kind, job.group.layer))
        order = _solver_order(job, share, weight, sums, options) if ranked is None else ranked.argsort(stable=True)
        keep_unit[order[: share.removed]] = False
    units = keep_unit.nonzero().squeeze(1)
    columns = least_squares.unit_columns(units, job.width)
    fitted = torch.zeros_like(weight)
    if options.compensate:
        solved = least_squares.refit(weight, sums.gram, columns, options.damping, sums.absorbed)
        fitted[:, columns] = solved.to(weight.dtype)
    else:
        fitted[:, columns] = weight[:, columns]
    extras = {"units": units}
    if sums.mean is not None:
        shift = (weight - fitted).double() @ sums.mean + (0 if sums.gain is None else sums.gain)
        extras["shift"] = shift.float()
    return Edited(fitted, extras)


def _solver_order(
    job: RefitJob, share: _Share, weight: torch.Tensor, sums: _Sums, options: RefitOptions
) -> torch.Tensor:
    """Units in the order they go by their least-squares saliency, `share.removed` of them at least."""
    group, damping = job.group, options.damping
    if len(job.orders.get(share.absorbed, ())) < share.removed:
        wanted = max(share.removed, min(options.most[group.kind], group.num_units - group.least))
        if sums.absorbed is not None:
            every = torch.arange(weight.shape[1], device=weight.device)
            weight = least_squares.refit(weight, sums.gram, every, damping, sums.absorbed)
        job.orders[share.absorbed] = least_squares.elimination_order(
            weight, sums.gram, group.num_units, wanted, damping=damping
        )
    return job.orders[share.absorbed]


def _about_mean(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp32 Gram matrix about the mean and the fp64 mean, from an fp64 moment whose last input is always 1."""
    total = moment[-1, -1].clamp(min=torch.finfo(torch.float32).tiny)
    mean = moment[:-1, -1] / total
    return (moment[:-1, :-1] - total * torch.outer(mean, mean)).float(), mean
