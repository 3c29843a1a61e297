"""Unit patterns: score layers, heads (KV groups), FFN channels and experts, choose what goes, re-fit what stays.

Probes decide between layers, heads and experts, in units of loss. Inside one FFN the layer's own output error decides
(every layer keeps the same width, so that stock classes load). Where several kinds may go, candidate mixes are tried
on the live model, measured, and undone to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tinygn_dist.anatomy import Anatomy, UnitGroup
from tinygn_dist.backends.pieces import Job
from tinygn_dist.budget import Latency, Mix, UnitSizes, mixes
from tinygn_dist.config import UNIT_KINDS, PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.activations import InputMoments, input_moments
from tinygn_dist.estimate.hooks import routed_to
from tinygn_dist.estimate.restart import running_layers
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.evaluate import mean_loss
from tinygn_dist.solve import least_squares
from tinygn_dist.unit_scores import UnitScores, score_units

log = logging.getLogger(__name__)
_ROUTED = "{} stay, as many as the router chooses for each token"
INNER_KINDS = tuple(kind for kind in UNIT_KINDS if kind != "layers")
MIXED_KINDS = ("heads", "channels", "experts")


@dataclass(frozen=True)
class KeptUnits:
    """What stays, by index in the dense model. The other kinds: per kept layer, ascending."""

    layers: tuple[int, ...]
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    channels: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    filters: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """by group of filters, in a convolutional net"""
    hidden: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """under 0, of the whole model"""

    def of(self, kind: str) -> Mapping[int, tuple[int, ...]]:
        return getattr(self, kind)

    def fingerprint(self) -> str:
        """16 hex digits, equal for equal choices."""
        told = [self.layers, *(sorted(self.of(kind).items()) for kind in INNER_KINDS)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def unit_sizes(anatomy: Anatomy) -> UnitSizes:
    """Counts and parameters per unit. UserError when layers differ, which no stock config could express afterwards."""
    facts: dict[str, tuple[int, int]] = {}
    for kind in MIXED_KINDS:
        seen = {(group.num_units, group.unit_params) for group in anatomy.of_kind(kind)}
        if len(seen) > 1:
            raise UserError(
                f"layers have different numbers of {kind}, which cannot be cut evenly; use --pattern layers"
            )
        facts[kind] = seen.pop() if seen else (0, 0)
    inner = [number for kind in MIXED_KINDS for number in facts[kind]]
    experts = anatomy.of_kind("experts")
    if len(anatomy.stacks) > 1:
        return UnitSizes(anatomy.num_layers, 0, *inner, uneven_params=sum(anatomy.layer_params))
    if not experts:
        return UnitSizes(anatomy.num_layers, max(anatomy.layer_params), *inner)
    sparse = {group.layer for group in experts}
    dense = [params for layer, params in enumerate(anatomy.layer_params) if layer not in sparse]
    sparse_params = anatomy.layer_params[experts[0].layer]
    return UnitSizes(anatomy.num_layers, sparse_params, *inner, experts[0].least, len(dense), max(dense, default=0))


def plan_mixes(anatomy: Anatomy, options: PruneConfig, latency: Latency | None = None) -> list[Mix]:
    """The mixes that reach the asked sparsity, a share of the layers' parameters or of a measured latency. UserError,
    before weights load, when none does."""
    kinds, sizes = options.unit_kinds, unit_sizes(anatomy)
    counted = options.counts is not None and len(anatomy.stacks) > 1
    if options.pattern in anatomy.fixed and not (counted and options.pattern == "layers"):
        others = [kind for kind in reversed(UNIT_KINDS) if kind not in anatomy.fixed]
        raise UserError(
            f"{options.pattern} cannot be removed: {anatomy.fixed[options.pattern]}; use --pattern {' or '.join(others)}"
        )
    if options.uneven:
        raise UserError(
            f"prune.uneven: {anatomy.model_class} builds its layers with one width that its config names, so they cannot differ; "
            "leave it out (pattern layers takes out whole ones), or mask weights with --pattern unstructured"
        )
    bad = [layer for layer in options.protect if not 0 <= layer < anatomy.num_layers]
    if bad:
        raise UserError(f"prune.protect names layer {bad[0]}, the model has layers 0 to {anatomy.num_layers - 1}")
    if options.protect and kinds != ("layers",):
        raise UserError("prune.protect keeps whole layers; other units are cut evenly in all, so use --pattern layers")
    if options.counts is not None:
        return [_fixed_mix(sizes, options, anatomy.num_layers - len(anatomy.lasting) if counted else 0)]
    found = list(mixes(sizes, options.sparsity, kinds, options.multiple_of, latency))
    found = [mix for mix in found if mix.layers <= anatomy.num_layers - max(1, len(options.protect))]
    if not found and latency:
        raise UserError(
            f"{options.pattern} cannot reach {options.target}: of {latency.total_seconds:.3g} s measured, "
            f"{latency.rest / latency.total_seconds:.0%} lie outside the layers ({_told(sizes)}); ask for more"
        )
    if not found:
        raise UserError(
            f"{options.pattern} cannot remove {options.sparsity:.0%} of the layers' {sizes.total_params:,} parameters "
            f"({_told(sizes)}); lower sparsity or use --pattern units"
        )
    return found


def dense_params(anatomy: Anatomy) -> int:
    """What a sparsity is a share of: the parameters of the layers."""
    return unit_sizes(anatomy).total_params


def _fixed_mix(sizes: UnitSizes, options: PruneConfig, most_layers: int) -> Mix:
    """most_layers: how many layers of several stacks may go, which no budget removes."""
    mix = Mix(**options.counts)
    for kind in ("layers", *MIXED_KINDS):
        there, asked = getattr(sizes, kind), getattr(mix, kind)
        most = max(most_layers, sizes.most(kind)) if kind == "layers" else sizes.most(kind)
        if asked and (kind not in options.unit_kinds or asked > most):
            raise UserError(
                f"prune.counts asks {asked} {kind} to go, the model has {there} (per layer) of which "
                f"{_ROUTED.format(sizes.least_experts) if kind == 'experts' else 'one stays'}, and pattern "
                f"{options.pattern} removes {', '.join(options.unit_kinds)}"
            )
    return mix


def _told(sizes: UnitSizes) -> str:
    told = f"layers {sizes.layers}, KV groups {sizes.heads}, channels {sizes.channels} per layer, at least one of each stays"
    if sizes.experts:
        told += f"; of {sizes.experts} experts {_ROUTED.format(sizes.least_experts)}"
    return told


@dataclass(frozen=True)
class Trial:
    """A mix that was applied to the live model, and the loss per token it left."""

    mix: Mix
    loss: float


def remove_units(
    setting: Setting, candidates: Sequence[Mix], options: PruneConfig
) -> tuple[KeptUnits, UnitScores, list[Trial]]:
    """Choose the units and zero them in the live model, with the rest re-fitted; `shrink` then takes them out (layers
    and experts are only named: no value of their weights is the same as their absence).

    Returns what stays, the scores with their standard errors, and every mix that was measured.
    """
    most = Mix(*(max(getattr(mix, kind) for mix in candidates) for kind in UNIT_KINDS))
    groups = [group for group in setting.anatomy.groups if getattr(most, group.kind)]
    fed = [group for group in groups if group.router is None]
    targets = [setting.anatomy.target_of(group.output) for group in fed]
    moments = input_moments(setting, targets, full=True) if fed else None
    probed = setting.first(options.probe_samples)
    scores = score_units(probed, most, options, moments)
    jobs = _jobs(setting, moments, fed) if moments else {}
    if len(candidates) == 1:
        return _apply(setting, candidates[0], most, scores, jobs, options), scores, []
    backend, changed = setting.backend, [target for job in jobs.values() for target in job.targets]
    dense = {target.name: backend.shard(setting.model, target).weight.clone() for target in changed}
    trials: list[Trial] = []

    def loss_of(mix: Mix) -> float:
        kept = _apply(setting, mix, most, scores, jobs, options)
        routed = {group: kept.experts[group.layer] for group in groups if group.router and group.layer in kept.experts}
        with routed_to(setting.bare, routed), running_layers(setting.bare, setting.anatomy, kept.layers):
            loss = mean_loss(probed, "trying a mix")
        for target in changed:
            backend.write(setting.model, target, dense[target.name])
        trials.append(Trial(mix, loss))
        log.info("without %s: loss %.4f", mix, loss)
        return loss

    best = _walk(candidates, loss_of)
    return _apply(setting, best, most, scores, jobs, options), scores, trials


def _walk(candidates: Sequence[Mix], loss_of: Callable[[Mix], float]) -> Mix:
    """More and more layers until the loss has risen twice in a row, for each number of heads until more heads are no
    better than fewer."""
    measured: dict[Mix, float] = {}
    best_before = float("inf")
    for heads in sorted({mix.heads for mix in candidates}):
        rises, last = 0, float("inf")
        level = sorted(mix for mix in candidates if mix.heads == heads)
        for mix in level:
            measured[mix] = loss_of(mix)
            rises = rises + 1 if measured[mix] > last else 0
            last = measured[mix]
            if rises == 2:
                break
        best_here = min(measured[mix] for mix in level if mix in measured)
        if best_here > best_before:
            break
        best_before = best_here
    return min(measured, key=lambda mix: (measured[mix], mix))


def _jobs(setting: Setting, moments: InputMoments, groups: Sequence[UnitGroup]) -> dict[UnitGroup, Job]:
    """One job per unit group: its output weight, and the Gram matrix of the inputs the units feed."""
    jobs = {}
    for group in groups:
        target = setting.anatomy.target_of(group.output)
        gram = moments.moments.pop(moments.of(target))
        jobs[group] = Job((target,), [gram], target.shape[1] ** 3 + target.shape[0] * target.shape[1] ** 2)
    setting.backend.sum_for_jobs(list(jobs.values()))
    return jobs


def _apply(
    setting: Setting, mix: Mix, most: Mix, scores: UnitScores, jobs: dict[UnitGroup, Job], options: PruneConfig
) -> KeptUnits:
    """Zero the heads and channels of one mix in the live weights, re-fit the columns that stay, and say what stays."""
    gone = set(scores.layer_order[: mix.layers])
    for group, job in jobs.items():
        job.extra |= {"group": group, "removed": 0 if group.layer in gone else getattr(mix, group.kind)}

    def solve(job: Job, weights: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [_solve_columns(job, weights[0], most, scores, options)]

    setting.backend.map_targets(setting.model, list(jobs.values()), solve)
    kept: dict[str, dict[int, tuple[int, ...]]] = {kind: {} for kind in INNER_KINDS}
    for group, job in jobs.items():
        if group.layer not in gone:
            kept[group.kind][group.layer] = job.outcome
    for group in setting.anatomy.of_kind("experts"):
        if mix.experts and group.layer not in gone:
            order = scores.by_group["experts", group.layer].argsort(stable=True)
            kept["experts"][group.layer] = tuple(sorted(order[mix.experts :].tolist()))
    layers = tuple(layer for layer in range(setting.anatomy.num_layers) if layer not in gone)
    return KeptUnits(layers, **kept)


def _solve_columns(
    job: Job, weight: torch.Tensor, most: Mix, scores: UnitScores, options: PruneConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    group, removed, gram = job.extra["group"], job.extra["removed"], job.moments[0].float()
    job.outcome = tuple(range(group.num_units))
    if removed == 0:
        return weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    ranked = scores.by_group.get((group.kind, group.layer))
    if ranked is not None:
        order = ranked.argsort(stable=True)
    else:  # the order is nested, so it serves every mix; the first call sees the dense weight
        if "order" not in job.extra:
            job.extra["order"] = least_squares.elimination_order(
                weight, gram, group.num_units, getattr(most, group.kind), damping=options.damping
            )
        order = job.extra["order"]
    keep_unit = torch.ones(group.num_units, dtype=torch.bool, device=weight.device)
    keep_unit[order[:removed]] = False
    units = keep_unit.nonzero().squeeze(1)
    job.outcome = tuple(units.tolist())
    columns = least_squares.unit_columns(units, group.output_width)
    fitted = torch.zeros_like(weight)
    if options.compensate:
        fitted[:, columns] = least_squares.refit(weight, gram, columns, options.damping).to(weight.dtype)
    else:
        fitted[:, columns] = weight[:, columns]
    keep = torch.zeros_like(weight, dtype=torch.bool)
    keep[:, columns] = True
    return fitted, keep
