"""Unit patterns: score layers, heads (KV groups) and FFN channels, choose what goes, and re-fit what stays.

Probes decide between layers and between heads, in units of loss. Inside one FFN the layer's own output error decides
(every layer keeps the same width, so that stock classes load). Where several kinds may go, candidate mixes are tried
on the live model, measured, and undone to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tinygn_dist.anatomy import Anatomy, Target, UnitGroup
from tinygn_dist.backends.base import Backend, Job
from tinygn_dist.budget import Mix, UnitSizes, mixes
from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.activations import input_moments
from tinygn_dist.estimate.restart import running_layers
from tinygn_dist.evaluate import mean_loss
from tinygn_dist.objective import Batch, Objective
from tinygn_dist.progress import Progress
from tinygn_dist.solve import least_squares
from tinygn_dist.unit_scores import UnitScores, score_units

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptUnits:
    """What stays, by index in the dense model. heads and channels: per kept layer, ascending."""

    layers: tuple[int, ...]
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    channels: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def of(self, kind: str) -> Mapping[int, tuple[int, ...]]:
        return self.heads if kind == "heads" else self.channels

    def fingerprint(self) -> str:
        """16 hex digits, equal for equal choices."""
        told = [self.layers, sorted(self.heads.items()), sorted(self.channels.items())]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def unit_sizes(anatomy: Anatomy) -> UnitSizes:
    """Counts and parameters per unit. UserError when layers differ, which no stock config could express afterwards."""
    facts: dict[str, tuple[int, int]] = {}
    for kind in ("heads", "channels"):
        seen = {(group.num_units, group.unit_params) for group in anatomy.of_kind(kind)}
        if len(seen) > 1:
            raise UserError(
                f"layers have different numbers of {kind}, which cannot be cut evenly; use --pattern layers"
            )
        facts[kind] = seen.pop() if seen else (0, 0)
    return UnitSizes(anatomy.num_layers, max(anatomy.layer_params), *facts["heads"], *facts["channels"])


def plan_mixes(anatomy: Anatomy, options: PruneConfig) -> list[Mix]:
    """The mixes that reach the asked sparsity. UserError, before weights load, when none does."""
    if "heads" in options.unit_kinds and not anatomy.of_kind("heads") and options.pattern == "heads":
        raise UserError(f"heads cannot be removed: {anatomy.family.attention.fixed}; use --pattern channels or layers")
    bad = [layer for layer in options.protect if not 0 <= layer < anatomy.num_layers]
    if bad:
        raise UserError(f"prune.protect names layer {bad[0]}, the model has layers 0 to {anatomy.num_layers - 1}")
    if options.protect and options.unit_kinds != ("layers",):
        raise UserError(
            "prune.protect keeps whole layers; heads and channels are cut evenly in all, so use --pattern layers"
        )
    sizes = unit_sizes(anatomy)
    found = list(mixes(sizes, options.sparsity, options.unit_kinds, options.multiple_of))
    found = [mix for mix in found if mix.layers <= anatomy.num_layers - max(1, len(options.protect))]
    if not found:
        raise UserError(
            f"{options.pattern} cannot remove {options.sparsity:.0%} of the layers' {sizes.total_params:,} parameters "
            f"(layers {sizes.layers}, KV groups {sizes.heads}, channels {sizes.channels} per layer, at least one of each "
            "stays); lower sparsity or use --pattern units"
        )
    return found


@dataclass
class Trial:
    mix: Mix
    loss: float


def remove_units(
    model: nn.Module,
    anatomy: Anatomy,
    candidates: Sequence[Mix],
    options: PruneConfig,
    objective: Objective,
    batches: Sequence[Batch],
    backend: Backend,
    progress: Progress,
) -> tuple[KeptUnits, UnitScores, list[Trial]]:
    """Choose the units and zero them in the live model, with the rest re-fitted; `shrink` then takes them out.

    Returns what stays, the scores with their standard errors, and every mix that was measured.
    """
    needed = {kind for mix in candidates for kind in ("layers", "heads", "channels") if getattr(mix, kind)}
    probed = batches[: max(1, -(-options.probe_samples // len(next(iter(batches[0].values())))))]
    moments = None
    if needed & {"heads", "channels"}:
        outputs = [g.output for g in anatomy.groups if g.kind in needed]
        moments = input_moments(model, batches, outputs, backend, progress, full=True)
    scores = score_units(
        model,
        anatomy,
        needed,
        max(mix.layers for mix in candidates),
        options,
        objective,
        probed,
        moments,
        backend,
        progress,
    )
    jobs = _jobs(anatomy, moments, needed, backend) if moments else {}
    if len(candidates) == 1:
        return _apply(model, anatomy, candidates[0], scores, jobs, options, backend), scores, []
    dense = {t.name: backend.shard(model, t).weight.clone() for job in jobs.values() for t in job.targets}
    trials: list[Trial] = []

    def loss_of(mix: Mix) -> float:
        kept = _apply(model, anatomy, mix, scores, jobs, options, backend)
        with running_layers(backend.unwrap(model), anatomy, kept.layers):
            loss = mean_loss(
                model, objective, probed, backend, progress, f"mix {mix.layers}L {mix.heads}H {mix.channels}C"
            )
        for job in jobs.values():
            for target in job.targets:
                backend.shard(model, target).weight.copy_(dense[target.name])
        trials.append(Trial(mix, loss))
        log.info(
            "removing %d layers, %d KV groups and %d channels of each: loss %.4f",
            mix.layers,
            mix.heads,
            mix.channels,
            loss,
        )
        return loss

    best = _walk(candidates, loss_of)
    return _apply(model, anatomy, best, scores, jobs, options, backend), scores, trials


def _walk(candidates: Sequence[Mix], loss_of) -> Mix:
    """For each number of heads, more and more layers until the loss has risen twice in a row."""
    measured: dict[Mix, float] = {}
    for heads in sorted({mix.heads for mix in candidates}):
        rises, last = 0, float("inf")
        for mix in sorted(m for m in candidates if m.heads == heads):
            measured[mix] = loss_of(mix)
            rises = rises + 1 if measured[mix] > last else 0
            last = measured[mix]
            if rises == 2:
                break
    return min(measured, key=lambda mix: (measured[mix], mix))


def output_target(group: UnitGroup, anatomy: Anatomy) -> Target:
    return next(target for target in anatomy.targets if target.module == group.output)


def _jobs(anatomy: Anatomy, moments, needed, backend: Backend) -> dict[UnitGroup, Job]:
    jobs = {}
    for group in anatomy.groups:
        if group.kind in needed:
            target = output_target(group, anatomy)
            gram = moments.moments.pop(moments.of(group.output))
            jobs[group] = Job((target,), [gram], target.shape[1] ** 3 + target.shape[0] * target.shape[1] ** 2)
    backend.sum_for_jobs(list(jobs.values()))
    return jobs


def _apply(model, anatomy, mix: Mix, scores: UnitScores, jobs: dict[UnitGroup, Job], options, backend) -> KeptUnits:
    """Zero the units of one mix in the live weights, re-fit the columns that stay, and say what stays."""
    gone = set(scores.layer_order[: mix.layers])
    kept_layers = tuple(layer for layer in range(anatomy.num_layers) if layer not in gone)
    for group, job in jobs.items():
        removed = mix.heads if group.kind == "heads" else mix.channels
        job.extra = {"group": group, "removed": 0 if group.layer in gone else removed}

    def solve(job: Job, weights: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [_solve_columns(job, weights[0], scores, options)]

    masks = backend.map_targets(model, list(jobs.values()), solve)
    kept: dict[str, dict[int, tuple[int, ...]]] = {"heads": {}, "channels": {}}
    for group, job in jobs.items():
        if group.layer in gone:
            continue
        columns = job.targets[0].matrix(masks[job.targets[0].name])[0]
        kept[group.kind][group.layer] = tuple(columns[:: group.output_width].nonzero().squeeze(1).tolist())
    return KeptUnits(kept_layers, kept["heads"], kept["channels"])


def _solve_columns(job: Job, weight: torch.Tensor, scores: UnitScores, options: PruneConfig):
    group, removed, gram = job.extra["group"], job.extra["removed"], job.moments[0].float()
    if removed == 0:
        return weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    ranked = scores.by_group.get((group.kind, group.layer))
    if ranked is None:
        units = least_squares.choose_inputs(weight, gram, group.num_units, removed, damping=options.damping)
    else:
        units = ranked.argsort(stable=True)[removed:].sort().values
    columns = (units[:, None] * group.output_width + torch.arange(group.output_width, device=units.device)).flatten()
    fitted = torch.zeros_like(weight)
    if options.compensate:
        fitted[:, columns] = least_squares.refit(weight, gram, columns, options.damping).to(weight.dtype)
    else:
        fitted[:, columns] = weight[:, columns]
    keep = torch.zeros_like(weight, dtype=torch.bool)
    keep[:, columns] = True
    return fitted, keep
