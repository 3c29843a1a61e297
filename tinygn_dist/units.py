"""Unit patterns: score layers, heads (KV groups), FFN channels and experts, choose what goes, re-fit what stays.

Probes decide between layers, heads and experts, in units of loss. Inside one FFN the layer's own output error decides
(every layer keeps the same width, so that stock classes load). Where several kinds may go, candidate mixes are tried
on the live model, measured, and undone to the last bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch

from tinygn_dist.anatomy import Anatomy
from tinygn_dist.backends.pieces import Job
from tinygn_dist.budget import Latency, Mix, UnitSizes, mixes
from tinygn_dist.config import UNIT_KINDS, PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.hooks import routed_to, shifted
from tinygn_dist.estimate.restart import running_layers
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.estimate.unit_inputs import unit_moments
from tinygn_dist.evaluate import mean_loss
from tinygn_dist.kept import KeptUnits, Removal, Trial
from tinygn_dist.mix_search import search
from tinygn_dist.removal import UnitScores
from tinygn_dist.unit_fit import apply_mix, fit_jobs, with_bias
from tinygn_dist.unit_scores import score_units

log = logging.getLogger(__name__)
_ROUTED = "{} stay, as many as the router chooses for each token"
_PROBE_TOKENS = 512
"""of which removal ranks the layers of SmolLM2-135M with a correlation of 0.93 with held-out losses, and heads with 0.82, where
two halves of what was held out agree with 0.98 and 0.83 (docs/results.md)"""
_MOST_LOOKS = 4
"""at mixes of which each was the best by the times of the ones before"""
MIXED_KINDS = ("heads", "channels", "experts")


def unit_sizes(anatomy: Anatomy) -> UnitSizes:
    """Counts and parameters per unit. UserError when layers differ, which no stock config could express afterwards."""
    facts: dict[str, tuple[int, int]] = {}
    for kind in MIXED_KINDS:
        by_count = len(anatomy.stacks) > 1 and kind == "heads"
        seen = {(group.num_units, 0 if by_count else group.unit_params) for group in anatomy.of_kind(kind)}
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
    if options.pattern in anatomy.fixed and not (
        counted and (options.pattern == "layers" or anatomy.of_kind(options.pattern))
    ):
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
    """most_layers: how many layers of several stacks may go, which no budget removes, as it removes no heads of them."""
    mix = Mix(**options.counts)
    for kind in ("layers", *MIXED_KINDS):
        there, asked = getattr(sizes, kind), getattr(mix, kind)
        by_count = {"layers": most_layers, "heads": sizes.heads - 1 if most_layers else 0}
        most = max(sizes.most(kind), by_count.get(kind, 0))
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


Replan = Callable[[Mix], Sequence[Mix]]
"""what there is to choose from once a mix was looked at more closely"""


def remove_units(
    setting: Setting, candidates: Sequence[Mix], options: PruneConfig, replan: Replan | None = None
) -> Removal:
    """Choose the units and zero them in the live model, with the rest re-fitted; `shrink` then takes them out (layers
    and experts are only named: no value of their weights is the same as their absence)."""
    most = _most_of(candidates)
    groups = [group for group in setting.anatomy.groups if getattr(most, group.kind)]
    fed = [group for group in groups if group.router is None]
    targets = [setting.anatomy.target_of(module) for group in fed for module, _ in group.readers]
    biased = with_bias(setting, targets, options)
    moments = unit_moments(setting, targets, biased) if fed else None
    probed = setting.first(options.probe_samples)
    scores = score_units(_enough_to_rank(probed, options) if len(candidates) > 1 else probed, most, options, moments)
    trials = _Trials(probed, most, options, scores, fit_jobs(setting, moments, fed, biased) if moments else [])
    best = trials.best_of(candidates)
    if replan is not None:
        best = _closer(trials, best, most, replan)
    kept, shifts = trials.apply(best)
    return Removal(kept, scores, [Trial(mix, loss) for mix, loss in trials.losses.items()], shifts)


def _closer(trials: _Trials, best: Mix, most: Mix, replan: Replan) -> Mix:
    """Has the best mix timed until it is the best by its own time too, `_MOST_LOOKS` times at most: the last may then be one that
    only the corrected table speaks for. most: as of `apply_mix`."""
    for _ in range(_MOST_LOOKS):
        others = [mix for mix in replan(best) if all(getattr(most, k) or not getattr(mix, k) for k in UNIT_KINDS)]
        if not others or best in others:
            break
        best = trials.best_of(others)
    return best


class _Trials:
    """Mixes applied to the live model, measured, and undone to the last bit. losses: per token, in the order tried."""

    def __init__(
        self,
        probed: Setting,
        most: Mix,
        options: PruneConfig,
        scores: UnitScores,
        jobs: Sequence[Job],
    ) -> None:
        self._setting, self._most, self._options, self._scores, self._jobs = probed, most, options, scores, jobs
        self._dense: dict[str, torch.Tensor] | None = None
        self.losses: dict[Mix, float] = {}

    def best_of(self, candidates: Sequence[Mix]) -> Mix:
        """The only one, or the one that leaves the least loss."""
        if len(candidates) == 1:
            return candidates[0]
        best, untried = search(candidates, self._loss_of, self._options.most_mixes, self.losses)
        if untried:
            self._setting.notes.append(
                f"{len(self.losses)} of the mixes that reach the target were tried (losses in the report) and {len(untried)} "
                f"left out by the search or by prune.most_mixes={self._options.most_mixes}, such as {untried[0]}"
            )
        return best

    def apply(self, mix: Mix) -> tuple[KeptUnits, dict[str, torch.Tensor]]:
        """Leaves the mix in the live weights. These must be the dense ones."""
        return apply_mix(self._setting, mix, self._most, self._scores, self._jobs, self._options)

    def _loss_of(self, mix: Mix) -> float:
        setting, backend = self._setting, self._setting.backend
        changed = [target for job in self._jobs for target in job.targets]
        if self._dense is None:
            self._dense = {target.name: backend.shard(setting.model, target).weight.clone() for target in changed}
        kept, shifts = self.apply(mix)
        routed = {g: kept.experts[g.layer] for g in setting.anatomy.of_kind("experts") if g.layer in kept.experts}
        with (
            routed_to(setting.bare, routed),
            shifted(setting.bare, shifts),
            running_layers(setting.bare, setting.anatomy, kept.layers),
        ):
            loss = mean_loss(setting, "trying a mix")
        for target in changed:
            backend.write(setting.model, target, self._dense[target.name])
        log.info("without %s: loss %.4f", mix, loss)
        return loss


def _enough_to_rank(probed: Setting, options: PruneConfig) -> Setting:
    """As many sequences as make _PROBE_TOKENS: probing every head on all of them takes longer than trying every mix."""
    tokens = probed.batches[0].get("input_ids")
    if tokens is None:
        return probed
    return probed.first(min(options.probe_samples, math.ceil(_PROBE_TOKENS / tokens.shape[1])))


def _most_of(candidates: Sequence[Mix]) -> Mix:
    """Of every kind, the largest number in any of them."""
    return Mix(*(max(getattr(mix, kind) for mix in candidates) for kind in UNIT_KINDS))
