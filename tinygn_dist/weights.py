"""Weight patterns (unstructured, N:M): estimate what the criterion needs, score, select, and for `obs` solve."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from tinygn_dist import score
from tinygn_dist.anatomy import Target
from tinygn_dist.backends.base import Job, Shard
from tinygn_dist.budget import num_kept
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.activations import InputMoments, input_moments
from tinygn_dist.estimate.backprop import weight_gradients
from tinygn_dist.estimate.directions import key_of, uniform
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.masking import Masks
from tinygn_dist.selection import choose_masks
from tinygn_dist.solve import obs

log = logging.getLogger(__name__)
DEFAULT_SCOPE = {"wanda": "row"}  # as published; elsewhere a weight matrix is the group


def sparsify(setting: Setting, targets: Sequence[Target], options: PruneConfig) -> Masks:
    """Choose masks and apply them to the live weights (criterion obs also updates what is kept)."""
    criterion = "obs" if options.criterion == "auto" else options.criterion
    if criterion == "obs":
        masks = _solve(setting, targets, options)
    else:
        scores = _scores(setting, targets, criterion, options.seed)
        scope = DEFAULT_SCOPE.get(criterion, "layer") if options.scope == "auto" else options.scope
        masks = choose_masks(
            setting.model,
            targets,
            scores,
            sparsity=options.sparsity,
            scope=scope,
            nm=options.nm,
            backend=setting.backend,
        )
    chosen = Masks(targets, masks)
    chosen.apply_(setting.model, setting.backend)
    return chosen


def _scores(setting: Setting, targets: Sequence[Target], criterion: str, seed: int) -> dict[str, torch.Tensor]:
    """fp32 scores shaped like this rank's shards."""
    shards = {target.name: setting.backend.shard(setting.model, target) for target in targets}
    match criterion:
        case "magnitude":
            return {name: score.magnitude(shard.weight) for name, shard in shards.items()}
        case "random":
            return {name: _random(shard, key_of(seed, name)) for name, shard in shards.items()}
        case "wanda":
            found = input_moments(setting, [t.module for t in targets], full=False)
            setting.backend.sum_over_data(found.moments.tensors())
            scores = {}
            for target in targets:
                weight, energy = shards[target.name].weight, found.moments.rounded(found.of(target.module))
                scores[target.name] = score.wanda(weight, target.per_input(energy, weight, shards[target.name].offset))
            return scores
        case "taylor" | "fisher":
            grads = weight_gradients(setting, targets, squares=criterion == "fisher")
            rule = score.fisher if criterion == "fisher" else score.taylor
            return {name: rule(shard.weight, grads.rounded(name)) for name, shard in shards.items()}
    raise AssertionError(criterion)


def _solve(setting: Setting, targets: Sequence[Target], options: PruneConfig) -> dict[str, torch.Tensor]:
    jobs = input_jobs(targets, input_moments(setting, [t.module for t in targets], full=True))
    setting.backend.sum_for_jobs(jobs)

    def solve(job: Job, weights: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        results, hessian = [], job.moments[0].float()
        for target, weight in zip(job.targets, weights, strict=True):
            solved = obs.prune(
                weight,
                hessian,
                target.numel - num_kept(target.numel, options.sparsity),
                nm=options.nm,
                per_row=options.scope == "row",
                damping=options.damping,
            )
            if solved.damping > options.damping:
                log.warning("%s: damping raised to %g to factorise its Hessian", target.name, solved.damping)
            results.append((solved.weight, solved.keep))
        return results

    return setting.backend.map_targets(setting.model, jobs, solve)


def input_jobs(targets: Sequence[Target], found: InputMoments) -> list[Job]:
    """Targets grouped by the input they share, with its Gram matrix and the cost of factorising and sweeping it."""
    by_source: dict[str, list[Target]] = {}
    for target in targets:
        by_source.setdefault(found.of(target.module), []).append(target)
    return [
        Job(tuple(group), [found.moments.pop(source)], sum(t.shape[0] for t in group) * n**2 + 2.0 * n**3)
        for source, group in by_source.items()
        for n in [group[0].shape[1]]
    ]


def _random(shard: Shard, key: int) -> torch.Tensor:
    weight = shard.weight
    return uniform(shard.offset, shard.offset + weight.numel(), key).view(weight.shape).to(weight.device)
